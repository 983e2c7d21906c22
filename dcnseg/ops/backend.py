"""Which code an operator runs: native where it was built and proved itself, else plain PyTorch.

Entry point: `use_native`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dcnseg.errors import NativeOpsError
from dcnseg.ops._native import missing_reason
from dcnseg.ops.checks import check_choice

Backend: TypeAlias = Literal["auto", "native", "reference"]
SelfTest: TypeAlias = Callable[[torch.device], str | None]

_warned_devices: set[str] = set()
_tested_gpus: dict[tuple[str, torch.device], str | None] = {}  # what the self-test said


def use_native(
    operator: str, backend: str, tensors: Sequence[Tensor | None], self_test: SelfTest
) -> bool:
    """Decide on the code to run; warn once per device if "auto" has to take the PyTorch code.

    Args:
        operator: Name of the operator, for messages.
        backend: "native", "reference" or "auto", as the caller of the operator gave it.
        tensors: All tensors of the call; the first one's device decides.
        self_test: Says why the operator's native code cannot be trusted on a GPU, or None.

    Raises:
        ConfigError: `backend` is none of the three.
        NativeOpsError: `backend` is "native", and the native code cannot serve.
    """
    if backend == "reference":
        return False
    check_choice(backend, "backend", ("auto", "native", "reference"))
    assert tensors[0] is not None
    device = tensors[0].device
    reason = _reason_not_native(operator, device, self_test)
    if reason is None:
        return not _is_transformed(operator, backend, tensors)
    if backend == "native":
        raise NativeOpsError(
            f"There is no native {operator} for {device.type} tensors: {reason}. "
            'Pass backend="auto" to take the PyTorch code instead.'
        )
    if device.type not in _warned_devices:
        _warned_devices.add(device.type)
        warnings.warn(
            f"dcnseg takes the slower PyTorch code for {device.type} tensors: {reason}.",
            RuntimeWarning,
            stacklevel=3,
        )
    return False


def _is_transformed(operator: str, backend: str, tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch.func or forward-mode differentiation looks on, which only PyTorch code serves.

    The native code would give their tangents as zero without a word.
    """
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and forward_ad._current_level >= 0:
        transformed = any(
            forward_ad.unpack_dual(tensor).tangent is not None
            for tensor in tensors
            if tensor is not None
        )
    if transformed and backend == "native":
        raise NativeOpsError(
            f"The native {operator} serves neither torch.func nor forward-mode differentiation; "
            'pass backend="auto" or "reference".'
        )
    return transformed


def _reason_not_native(operator: str, device: torch.device, self_test: SelfTest) -> str | None:
    """Why the native code cannot serve this device; the first use of a GPU tests it."""
    if device.type != "cuda":
        return missing_reason("cpu" if device.type == "meta" else device.type)
    if missing_reason("cuda") is not None:
        return missing_reason("cuda")
    if torch.are_deterministic_algorithms_enabled():
        return "its gradients are not deterministic there, as torch is told that they must be"
    if (operator, device) not in _tested_gpus:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return "its self-test has not run; call the operator once before compiling or capturing"
        _tested_gpus[operator, device] = self_test(device)
    return _tested_gpus[operator, device]
