"""The native deformable convolution: its call, its fake implementation and its autograd formula.

Entry point: `deform_conv2d_native`. The schemas are defined in cuda_ops/cpu/ops_cpu.cpp.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dcnseg.errors import NativeOpsError
from dcnseg.ops._native import missing_reason
from dcnseg.ops.deform_conv.checks import Border, Window, check_arguments
from dcnseg.ops.deform_conv.reference import deform_conv2d_reference
from dcnseg.ops.layout import dense, is_channels_last, memory_format
from dcnseg.ops.self_test import SmallCase, run_self_test

_BORDERS: dict[Border, int] = {"zero": 0, "dcnv1": 3}  # `Border` in cuda_ops/include/bilinear.h

_unfused_gpus: set[int | None] = (
    set()
)  # indices of GPUs where the fused kernel failed its self-test


def deform_conv2d_native(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    mask: Tensor | None,
    *,
    fused: bool = True,
    allow_tf32: bool | None = None,
) -> Tensor:
    """Deformable convolution as in `dcnseg.ops.deform_conv2d`.

    Arguments that do not agree raise a RuntimeError, or a ShapeError on the meta device and in
    graphs. An empty `bias` or `mask` is treated as None.

    Args:
        input: As in `deform_conv2d`.
        offset: As in `deform_conv2d`.
        weight: As in `deform_conv2d`.
        bias: As in `deform_conv2d`.
        window: Stride, padding, dilation and border.
        mask: As in `deform_conv2d`.
        fused: Whether to use the fused CUDA kernel, which does not write columns to DRAM.
        allow_tf32: Whether to multiply float32 as TF32 on a GPU. None: the torch setting for
            convolutions.
    """
    position_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    offset = _to_position_dtype(offset, position_dtype)
    mask = offset.new_empty(0) if mask is None else _to_position_dtype(mask, position_dtype)
    bias = input.new_empty(0) if bias is None else bias.contiguous()
    if input.is_cuda:
        offset, mask = offset.contiguous(), mask.contiguous()
    tensors = (dense(input), offset, mask, dense(weight), bias)
    with _skip_autograd(tensors):
        output: Tensor = torch.ops.dcnseg.deform_conv2d(
            *tensors,
            *window.stride,
            *window.padding,
            *window.dilation,
            _BORDERS[window.border],
            is_channels_last(input),
            _allows_tf32(input) if allow_tf32 is None else allow_tf32,
            fused and input.get_device() not in _unfused_gpus,
        )
    return output


def _to_position_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a floating-point tensor; the operator raises for any other."""
    is_cast = tensor.dtype != dtype and tensor.is_floating_point()
    return tensor.to(dtype) if is_cast else tensor


def _skip_autograd(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Avoid the overhead of the autograd formula, which is in Python, if no gradient is needed."""
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or torch.overrides.has_torch_function(tensors)  # may compute gradients itself
    ):
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def _allows_tf32(input: Tensor) -> bool:
    if not (input.is_cuda and input.dtype == torch.float32):
        return False
    if torch.compiler.is_compiling():  # traces and guards only the older of the two settings
        return torch.backends.cudnn.allow_tf32
    # The older setting raises if the newer one differs for recurrent networks.
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def _fake_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    *settings: int,
) -> Tensor:
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _border, channels_last, *_ = settings
    window = Window((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
    check_arguments(input, offset, weight, _none_if_empty(bias), window, _none_if_empty(mask))
    size = (input.shape[0], weight.shape[0], *offset.shape[2:])
    return torch.empty(
        size,
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(bool(channels_last)),
    )


def _none_if_empty(tensor: Tensor) -> Tensor | None:
    return None if tensor.dim() == 1 and tensor.shape[0] == 0 else tensor


def _fake_deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    *settings: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_input, needs_offset, needs_mask, needs_weight = settings[7:11]
    return (
        torch.empty_like(input) if needs_input else input.new_empty(0),
        offset.new_empty(offset.shape if needs_offset else 0),
        mask.new_empty(mask.shape if needs_mask else 0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, weight, _bias, *settings, _channels_last, allow_tf32, _fused = inputs
    ctx.save_for_backward(input, offset, mask, weight)
    ctx.settings, ctx.allow_tf32 = settings, allow_tf32


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, mask, weight = ctx.saved_tensors
    needs_grad = ctx.needs_input_grad[:4]
    grads: list[Tensor | None] = [None] * 5
    if any(needs_grad):
        grad = dense(grad) if grad.is_cuda else grad
        computed = torch.ops.dcnseg.deform_conv2d_backward(
            grad, input, offset, mask, weight, *ctx.settings, *needs_grad, ctx.allow_tf32
        )
        grads[:4] = [
            tensor if needed else None for tensor, needed in zip(computed, needs_grad, strict=True)
        ]
    if ctx.needs_input_grad[4]:
        grads[4] = grad.sum((0, 2, 3))
    return (*grads, *(None,) * 10)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NativeOpsError(
        'The native deform_conv2d is not twice differentiable. Pass backend="reference".'
    )


def cuda_self_test(device: torch.device) -> str | None:
    """Run the self-test of the CUDA kernels; see `run_self_test`.

    If only the fused kernel fails, it is disabled on this device with a warning.
    """
    reason = run_self_test(_cases(fused=False), device)
    if reason is None:
        fused_reason = run_self_test(_cases(fused=True), device)
        if fused_reason is not None:
            _unfused_gpus.add(device.index)
            warnings.warn(
                f"dcnseg uses slower kernels for deform_conv2d: the fused kernel {fused_reason}.",
                RuntimeWarning,
                stacklevel=2,
            )
    return reason


def _cases(fused: bool) -> list[SmallCase]:
    """Cases in both memory formats, with and without a multiple of 16 bytes per pixel."""
    kinds = [  # dtype, channels, groups, outputs, has_mask, channels_last
        (torch.float32, 64, 2, 6, True, True),
        (torch.bfloat16, 64, 1, 6, False, False),
        (torch.float16, 64, 1, 6, True, True),
    ]
    if fused:  # up to 64, 128 and 256 output channels have kernels of their own
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        sizes = [(dtype, outputs) for dtype in dtypes for outputs in (128, 256)]
        kinds += [(dtype, 64, 1, outputs, True, outputs == 256) for dtype, outputs in sizes]
    else:
        kinds += [(torch.float64, 4, 1, 6, True, False), (torch.bfloat16, 6, 2, 6, True, True)]
    return [partial(_small_case, *kind, fused=fused) for kind in kinds]


def _small_case(
    dtype: torch.dtype,
    channels: int,
    groups: int,
    outputs: int,
    has_mask: bool,
    channels_last: bool,
    native: bool,
    device: torch.device,
    *,
    fused: bool,
) -> list[Tensor]:
    """Return output and gradients of a case with samples inside and outside the map."""
    generator = torch.Generator().manual_seed(0)
    position_dtype = torch.promote_types(dtype, torch.float32)

    def leaf(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return (scale * values).to(device, dtype).requires_grad_()

    size = (13, 11)  # 286 positions in two images: more than two tiles of 128
    input = leaf(2, channels, *size)
    weight = leaf(outputs, channels // groups, 3, 3, scale=0.1)  # the maximum of float16 is 65504
    offset = leaf(2, 18 * groups, *size, dtype=position_dtype)
    mask = leaf(2, 9 * groups, *size, dtype=position_dtype) if has_mask else None
    bias = leaf(outputs) if has_mask else None
    image = input.contiguous(memory_format=memory_format(channels_last))
    arguments = (image, offset, weight, bias, Window((1, 1), (1, 1), (1, 1)), mask)
    if native:
        # TF32 may be enabled later, and the test runs only once.
        allow_tf32 = True if fused else None
        output = deform_conv2d_native(*arguments, fused=fused, allow_tf32=allow_tf32)
    else:
        output = deform_conv2d_reference(*arguments)
    leaves = [tensor for tensor in (input, offset, weight, bias, mask) if tensor is not None]
    if not has_mask:
        leaves = [offset, weight]  # as in a first layer, whose input needs no gradient
    total = output.to(position_dtype).square().sum()
    return [output, *torch.autograd.grad(total, leaves)]


def _register() -> None:
    """Register fake implementations and autograd formulas."""
    library = torch.library
    library.register_fake("dcnseg::deform_conv2d", _fake_deform_conv2d)
    library.register_fake("dcnseg::deform_conv2d_backward", _fake_deform_conv2d_backward)
    library.register_autograd("dcnseg::deform_conv2d", _backward, setup_context=_save_for_backward)
    library.register_autograd("dcnseg::deform_conv2d_backward", _refuse_second_derivative)


if missing_reason("cpu") is None:
    _register()
