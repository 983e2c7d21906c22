"""What the last digits of a run depend on besides its settings: threads, versions, the processor.

Sums in floating point depend on the order of their terms, and that on the number of threads and on
the instructions that a library chooses. A resume state holds a description of all that; a resumed
run computes with as many threads as before, and warns of what is different.

Entry points: `describe_environment`, `computes_as_before`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import PIL
import torch
import torchvision

from dcnseg import __version__
from dcnseg.errors import CheckpointError
from dcnseg.ops._native import missing_reason

ENVIRONMENT: Final = "environment"  # key of a resume state
THREADS: Final = "threads"
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MOST_THREADS: Final = 4096


def describe_environment(device: torch.device, amp_dtype: torch.dtype | None) -> dict[str, Any]:
    """Everything by whose change a resumed run may differ in the last digits, as plain values."""
    is_cpu = device.type == "cpu"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "number format": str(amp_dtype or torch.float32).removeprefix("torch."),
        THREADS: torch.get_num_threads(),
        "processor": processor_name() if is_cpu else "",
        "instructions": torch.backends.cpu.get_cpu_capability() if is_cpu else "",
        "operators": "native" if missing_reason(device.type) is None else "PyTorch code",
        "dcnseg": __version__,
        "torch": str(torch.__version__),  # a class of its own otherwise
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
    }


def processor_name() -> str:
    """The processor's model where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


@contextmanager
def computes_as_before(
    saved: Mapping[str, Any],
    device: torch.device,
    amp_dtype: torch.dtype | None,
    on_warning: Callable[[str], None],
) -> Iterator[None]:
    """Within it, torch computes with as many threads as the saved state was made with.

    The number stays what it is where the user has set it (OMP_NUM_THREADS), and where this machine
    has fewer processors.

    Args:
        saved: A resume state; if it holds no description of its environment, nothing is done.
        device: Where to compute.
        amp_dtype: The lower-precision format, or None.
        on_warning: Told what is different from before.

    Raises:
        CheckpointError: the description is damaged.
    """
    before = saved.get(ENVIRONMENT)
    if before is None:  # written by a version that did not note it
        yield
        return
    _check_description(before)
    own_threads = torch.get_num_threads()
    if device.type == "cpu":
        _restore_threads(before[THREADS], on_warning)
    different = _differences(before, describe_environment(device, amp_dtype))
    if different:
        on_warning(
            f"What the run computes with has changed: {', '.join(different)}. So its result will "
            "not be bit for bit that of a run that never stopped."
        )
    try:
        yield
    finally:
        torch.set_num_threads(own_threads)


def _check_description(before: Any) -> None:
    is_whole = isinstance(before, Mapping) and all(isinstance(key, str) for key in before)
    threads = before.get(THREADS) if is_whole else None
    if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
        raise CheckpointError(
            f"The resume state's description of its environment is damaged: expected {THREADS} "
            f"from 1 to {_MOST_THREADS}."
        )


def _restore_threads(threads: int, on_warning: Callable[[str], None]) -> None:
    own = torch.get_num_threads()
    is_set = any(os.environ.get(name) for name in _THREAD_VARIABLES)
    if threads == own or is_set or threads > _processors():
        return
    torch.set_num_threads(threads)
    on_warning(
        f"Computing with {threads} threads, as the run did before, although {own} would be taken "
        f"here. OMP_NUM_THREADS={own} takes them; the result then differs in its last digits."
    )


def _processors() -> int:
    is_limited = hasattr(os, "sched_getaffinity")  # by a container, say; not known on macOS
    return len(os.sched_getaffinity(0)) if is_limited else os.cpu_count() or 1


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    is_cpu = now["device"] == "cpu"
    return [
        f"{name} {value} (before: {before[name]})"
        for name, value in now.items()
        if name in before and value and before[name] and value != before[name]
        if is_cpu or name != THREADS
    ]
