"""The native deformable convolution as torch sees it: its call, its shapes, its derivatives.

Entry point: `deform_conv2d_native`. The operators' schemas stand in cuda_ops/cpu/ops_cpu.cpp.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dcnseg.errors import NativeOpsError
from dcnseg.ops._native import missing_reason
from dcnseg.ops.deform_conv_checks import Window
from dcnseg.ops.layout import dense, is_channels_last, memory_format
from dcnseg.ops.reference import deform_conv2d_reference
from dcnseg.ops.self_test import SmallCase, run_self_test

_BORDERS = {"zero": 0, "dcnv1": 3}  # `Border` in cuda_ops/include/bilinear.h


def deform_conv2d_native(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    mask: Tensor | None,
) -> Tensor:
    """Deformable convolution of checked arguments; see `dcnseg.ops.deform_conv2d`."""
    on_cuda = input.is_cuda
    channels_last = is_channels_last(input)
    position_dtype = torch.promote_types(input.dtype, torch.float32)
    offset = offset.to(position_dtype)
    mask = offset.new_empty(0) if mask is None else mask.to(position_dtype)
    bias = input.new_empty(0) if bias is None else bias
    if on_cuda:  # its kernels read contiguous tensors only
        tensors = [tensor.contiguous() for tensor in (input, offset, mask, weight, bias)]
    else:
        tensors = [dense(input), offset, mask, dense(weight), bias.contiguous()]
    output: Tensor = torch.ops.dcnseg.deform_conv2d(
        *tensors,
        *window.stride,
        *window.padding,
        *window.dilation,
        _BORDERS[window.border],
        channels_last and not on_cuda,
    )
    if channels_last and on_cuda:
        output = output.contiguous(memory_format=torch.channels_last)
    return output


def _fake_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    *numbers: int,
) -> Tensor:
    size = (input.shape[0], weight.shape[0], *offset.shape[2:])
    channels_last = bool(numbers[-1])
    return torch.empty(
        size,
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(channels_last),
    )


def _fake_deform_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    *numbers: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input_wanted, offset_wanted, mask_wanted, weight_wanted = numbers[-4:]
    return (
        torch.empty_like(input) if input_wanted else input.new_empty(0),
        offset.new_empty(offset.shape if offset_wanted else 0),
        mask.new_empty(mask.shape if mask_wanted else 0),
        torch.empty_like(weight) if weight_wanted else weight.new_empty(0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, weight, _bias, *numbers, _channels_last = inputs
    ctx.save_for_backward(input, offset, mask, weight)
    ctx.numbers = numbers


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, mask, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    grads: list[Tensor | None] = [None] * 5
    if any(wanted):
        grad = grad.contiguous() if grad.is_cuda else grad
        made = torch.ops.dcnseg.deform_conv2d_backward(
            grad, input, offset, mask, weight, *ctx.numbers, *wanted
        )
        grads[:4] = [
            tensor if is_wanted else None for tensor, is_wanted in zip(made, wanted, strict=True)
        ]
    if ctx.needs_input_grad[4]:
        grads[4] = grad.sum((0, 2, 3))
    return (*grads, *(None,) * 8)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NativeOpsError(
        'The native deform_conv2d has no second derivative; pass backend="reference" for one.'
    )


def cuda_self_test(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot be trusted on this device; None if small cases come out right."""
    return run_self_test(
        [
            SmallCase(dtype, partial(_small_case, dtype=dtype, groups=groups, has_mask=has_mask))
            for dtype, groups, has_mask in ((torch.float32, 2, True), (torch.bfloat16, 1, False))
        ],
        device,
    )


def _small_case(
    native: bool, device: torch.device, *, dtype: torch.dtype, groups: int, has_mask: bool
) -> list[Tensor]:
    """Output and gradients of a case with offsets on both sides of the map's edges."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return values.to(device, dtype).requires_grad_()

    input, weight = leaf(2, 4, 6, 5), leaf(6, 4 // groups, 3, 3)
    offset = leaf(2, 18 * groups, 6, 5, dtype=torch.float32)
    mask = leaf(2, 9 * groups, 6, 5, dtype=torch.float32) if has_mask else None
    bias = leaf(6) if has_mask else None
    run = deform_conv2d_native if native else deform_conv2d_reference
    output = run(input, offset, weight, bias, Window((1, 1), (1, 1), (1, 1)), mask)
    wanted = [tensor for tensor in (input, offset, weight, bias, mask) if tensor is not None]
    if not has_mask:
        wanted = [offset, weight]  # as in a first layer, whose input wants no gradient
    return [output, *torch.autograd.grad(output.float().square().sum(), wanted)]


def _register() -> None:
    """Give the native operators their shapes under torch.compile and their derivatives."""
    library = torch.library
    library.register_fake("dcnseg::deform_conv2d", _fake_deform_conv2d)
    library.register_fake("dcnseg::deform_conv2d_backward", _fake_deform_conv2d_backward)
    library.register_autograd("dcnseg::deform_conv2d", _backward, setup_context=_save_for_backward)
    library.register_autograd("dcnseg::deform_conv2d_backward", _refuse_second_derivative)


if missing_reason("cpu") is None:
    _register()
