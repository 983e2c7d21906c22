"""The environment of a run: threads, versions and hardware that affect rounding.

Floating-point sums depend on the order of their terms, hence on the number of threads and the
processor's instructions. Checkpoints store a description of the environment; a resumed run uses the
same number of threads and warns about other differences.

Entry points: `describe_environment`, `restore_environment`.
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

ENVIRONMENT: Final = "environment"  # key in a checkpoint
THREADS: Final = "threads"
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_MAX_THREADS: Final = 4096


def describe_environment(device: torch.device, amp_dtype: torch.dtype | None) -> dict[str, Any]:
    """Describe everything that may change the rounding of a resumed run, as plain values."""
    is_cpu = device.type == "cpu"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "number format": str(amp_dtype or torch.float32).removeprefix("torch."),
        THREADS: torch.get_num_threads(),
        "processor": processor_name() if is_cpu else "",
        "instructions": torch.backends.cpu.get_cpu_capability() if is_cpu else "",
        "operators": "native" if missing_reason(device.type) is None else "PyTorch code",
        "dcnseg": __version__,
        "torch": str(torch.__version__),  # a subclass of str
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
    }


def processor_name() -> str:
    """Return the processor's model if known, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


@contextmanager
def restore_environment(
    saved: Mapping[str, Any],
    device: torch.device,
    amp_dtype: torch.dtype | None,
    on_warning: Callable[[str], None],
) -> Iterator[None]:
    """Set torch's number of threads to that of the checkpoint, and restore it on exit.

    The number is kept if the user has set it (OMP_NUM_THREADS) or the machine has fewer processors.

    Raises:
        CheckpointError: the description is damaged.
    """
    before = saved.get(ENVIRONMENT)
    if before is None:  # written by an early version
        yield
        return
    _check_description(before)
    own_threads = torch.get_num_threads()
    if device.type == "cpu":
        _restore_threads(before[THREADS], on_warning)
    different = _differences(before, describe_environment(device, amp_dtype))
    if different:
        on_warning(
            f"The environment of the run has changed: {', '.join(different)}. The result may "
            "differ slightly from that of an uninterrupted run."
        )
    try:
        yield
    finally:
        torch.set_num_threads(own_threads)


def _check_description(before: Any) -> None:
    is_whole = isinstance(before, Mapping) and all(isinstance(key, str) for key in before)
    threads = before.get(THREADS) if is_whole else None
    if type(threads) is not int or not 1 <= threads <= _MAX_THREADS:
        raise CheckpointError(
            f"The environment recorded in the checkpoint is damaged: expected {THREADS} from 1 to "
            f"{_MAX_THREADS}."
        )


def _restore_threads(threads: int, on_warning: Callable[[str], None]) -> None:
    own = torch.get_num_threads()
    is_set = any(os.environ.get(name) for name in _THREAD_VARIABLES)
    if threads == own or is_set or threads > _processors():
        return
    torch.set_num_threads(threads)
    on_warning(
        f"Using {threads} threads as before, instead of this machine's default of {own}. Set "
        f"OMP_NUM_THREADS={own} to use the default; the result may then differ slightly."
    )


def _processors() -> int:
    is_limited = hasattr(os, "sched_getaffinity")  # for example by a container; not on macOS
    return len(os.sched_getaffinity(0)) if is_limited else os.cpu_count() or 1


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    is_cpu = now["device"] == "cpu"
    return [
        f"{name} {value} (before: {before[name]})"
        for name, value in now.items()
        if name in before and value and before[name] and value != before[name]
        if is_cpu or name != THREADS
    ]
