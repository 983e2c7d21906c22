"""Small cases that native code must get right on a device before it is trusted there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

# The largest difference, relative to the largest value. TF32 may be on; a wrong kernel is off by
# far more.
_TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 1e-2,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


class SmallCase(NamedTuple):
    """A call of an operator: `run(native, device)` gives its output and gradients."""

    dtype: torch.dtype
    run: Callable[[bool, torch.device], list[Tensor]]


def run_self_test(cases: Sequence[SmallCase], device: torch.device) -> str | None:
    """Why the native code cannot be trusted on this device; None if all cases come out right.

    A driver that is too old, or a GPU that the library was not built for, shows itself only at the
    first launch. The test runs on a thread of its own, where none of the caller's modes and hooks
    (autocast, checkpointing, torch.func, a default device) can disturb it or be disturbed.

    Raises:
        torch.OutOfMemoryError: there is no room for the test; nothing is known then.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(_compare, cases, device).result()


def _compare(cases: Sequence[SmallCase], device: torch.device) -> str | None:
    try:
        for case in cases:
            results = [case.run(native, device) for native in (False, True)]
            for truth, ours in zip(*results, strict=True):
                truth, ours = truth.detach().double(), ours.detach().double()
                difference = float((ours - truth).abs().max() / truth.abs().max())
                if not difference < _TOLERANCES[case.dtype]:
                    return f"failed its self-test on {device}: a result is off by {difference:.2g}"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"failed its self-test on {device}: {error}"
    return None
