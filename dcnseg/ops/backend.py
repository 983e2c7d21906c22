"""Choice between the native and the PyTorch implementation of an operator: `use_native`."""

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
_tested_gpus: dict[tuple[str, torch.device], str | None] = {}  # result of the self-test


def use_native(
    operator: str, backend: str, tensors: Sequence[Tensor | None], self_test: SelfTest
) -> bool:
    """Return whether to run the native implementation of an operator.

    Warns once per device type if `backend` is "auto" and the native operator is not available.

    Args:
        operator: Name of the operator, used in messages.
        backend: "auto", "native" or "reference".
        tensors: All tensors of the call; the device of the first one is used.
        self_test: Returns why the CUDA kernels give wrong results on a GPU, or None if they do not.
            It runs once per operator and GPU.

    Raises:
        ConfigError: `backend` is not one of the three values.
        NativeOpsError: `backend` is "native" and the native operator is not available.
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
            f"The native {operator} is not available for {device.type} tensors: {reason}. "
            'Pass backend="auto" to use the PyTorch implementation.'
        )
    if device.type not in _warned_devices:
        _warned_devices.add(device.type)
        warnings.warn(
            f"dcnseg uses the slower PyTorch implementation for {device.type} tensors: {reason}.",
            RuntimeWarning,
            stacklevel=3,
        )
    return False


def _is_transformed(operator: str, backend: str, tensors: Sequence[Tensor | None]) -> bool:
    """Return whether the call runs under torch.func or forward-mode differentiation.

    Only the PyTorch implementation supports them: the native operators would silently return
    zero tangents.
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
            f"The native {operator} supports neither torch.func nor forward-mode "
            'differentiation. Pass backend="auto" or backend="reference".'
        )
    return transformed


def _reason_not_native(operator: str, device: torch.device, self_test: SelfTest) -> str | None:
    """Return why the native operator cannot run on a device, or None; tests a GPU on first use."""
    if device.type != "cuda":
        return missing_reason("cpu" if device.type == "meta" else device.type)
    if missing_reason("cuda") is not None:
        return missing_reason("cuda")
    if torch.are_deterministic_algorithms_enabled():
        return "its CUDA gradients are not deterministic, and deterministic algorithms are enabled"
    if (operator, device) not in _tested_gpus:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return "its self-test has not run; call the operator once before compiling or capturing"
        _tested_gpus[operator, device] = self_test(device)
    return _tested_gpus[operator, device]
