"""Self-test of the native operators on a GPU: `run_self_test`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

# A small call of an operator: run(native, device) returns its output and gradients.
SmallCase: TypeAlias = Callable[[bool, torch.device], list[Tensor]]

# Maximum difference relative to the largest value. TF32 may be enabled; a wrong kernel differs by
# far more.
_TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 1e-2,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def run_self_test(cases: Sequence[SmallCase], device: torch.device) -> str | None:
    """Compare the native operator with the PyTorch implementation on small cases.

    A driver that is too old and a GPU that the library was not built for are detected only at the
    first launch. The test runs in its own thread, because the caller's modes and hooks (autocast,
    checkpointing, torch.func, a default device) are thread-local and would affect it.

    Returns:
        Why the native operator cannot be used on this device, or None if all cases agree.

    Raises:
        torch.OutOfMemoryError: The test itself runs out of memory; it is repeated next time.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(_compare, cases, device).result()


def _compare(cases: Sequence[SmallCase], device: torch.device) -> str | None:
    try:
        for case in cases:
            results = [case(native, device) for native in (True, False)]
            tolerance = _TOLERANCES[results[0][0].dtype]
            for actual, expected in zip(*results, strict=True):
                actual, expected = actual.detach().double(), expected.detach().double()
                difference = float((actual - expected).abs().max() / expected.abs().max())
                if not difference < tolerance:
                    return f"failed its self-test on {device}: relative error {difference:.2g}"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"failed its self-test on {device}: {error}"
    return None
