"""The native deformable convolution as torch sees it: its call, its shapes, its derivatives.

Entry point: `deform_conv2d_native`. The operators' schemas stand in cuda_ops/cpu/ops_cpu.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dcnseg.errors import NativeOpsError
from dcnseg.ops._native import missing_reason
from dcnseg.ops.deform_conv_checks import Window
from dcnseg.ops.reference import deform_conv2d_reference


def deform_conv2d_native(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    mask: Tensor | None,
) -> Tensor:
    """Deformable convolution of checked arguments; see `dcnseg.ops.deform_conv2d`."""
    dtype, on_cuda = input.dtype, input.is_cuda
    if dtype == torch.float16 and not on_cuda:  # computed in float32
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
    channels_last = not input.is_contiguous() and _is_channels_last(input)
    position_dtype = torch.promote_types(input.dtype, torch.float32)
    offset = offset.to(position_dtype)
    mask = offset.new_empty(0) if mask is None else mask.to(position_dtype)
    bias = input.new_empty(0) if bias is None else bias
    if on_cuda:  # its kernels read contiguous tensors only
        tensors = [tensor.contiguous() for tensor in (input, offset, mask, weight, bias)]
    else:
        tensors = [_dense(input), offset, mask, _dense(weight), bias.contiguous()]
    output: Tensor = torch.ops.dcnseg.deform_conv2d(
        *tensors,
        *window.stride,
        *window.padding,
        *window.dilation,
        channels_last and not on_cuda,
    )
    if channels_last and on_cuda:
        output = output.contiguous(memory_format=torch.channels_last)
    return output.to(dtype)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or channels-last, as the kernels need it."""
    return tensor if _is_channels_last(tensor) else tensor.contiguous()


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _fake_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    *numbers: int,
) -> Tensor:
    size = (input.shape[0], weight.shape[0], *offset.shape[2:])
    channels_last = numbers[-1]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)


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
    *tensors, _, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)


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
    return (*grads, *(None,) * 7)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NativeOpsError(
        'The native deform_conv2d has no second derivative; pass backend="reference" for one.'
    )


def cuda_self_test(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot be trusted on this device; None if small cases come out right.

    A driver that is too old, or a GPU that the library was not built for, shows itself only at the
    first launch. The test runs on a thread of its own, where none of the caller's modes and hooks
    (autocast, checkpointing, torch.func, a default device) can disturb it or be disturbed.

    Raises:
        torch.OutOfMemoryError: there is no room for the test; nothing is known then.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(_compare_with_reference, device).result()


def _compare_with_reference(device: torch.device) -> str | None:
    try:
        for dtype, groups, has_mask in ((torch.float32, 2, True), (torch.bfloat16, 1, False)):
            results = [
                _small_case(run, device, dtype, groups, has_mask=has_mask)
                for run in (deform_conv2d_reference, deform_conv2d_native)
            ]
            for truth, ours in zip(*results, strict=True):
                difference = float((ours - truth).abs().max() / truth.abs().max())
                # TF32 may be on; a wrong kernel is off by far more.
                if not difference < (1e-2 if dtype == torch.float32 else 1e-1):
                    return f"failed its self-test on {device}: a result is off by {difference:.2g}"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"failed its self-test on {device}: {error}"
    return None


def _small_case(
    run: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    groups: int,
    *,
    has_mask: bool,
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
    output = run(input, offset, weight, bias, Window((1, 1), (1, 1), (1, 1)), mask)
    wanted = [tensor for tensor in (input, offset, weight, bias, mask) if tensor is not None]
    if not has_mask:
        wanted = [offset, weight]  # as in a first layer, whose input wants no gradient
    grads = torch.autograd.grad(output.float().square().sum(), wanted)
    return [tensor.detach().double().cpu() for tensor in (output, *grads)]


def _register() -> None:
    """Give the native operators their shapes under torch.compile and their derivatives."""
    library = torch.library
    library.register_fake("dcnseg::deform_conv2d", _fake_deform_conv2d)
    library.register_fake("dcnseg::deform_conv2d_backward", _fake_deform_conv2d_backward)
    library.register_autograd("dcnseg::deform_conv2d", _backward, setup_context=_save_for_backward)
    library.register_autograd("dcnseg::deform_conv2d_backward", _refuse_second_derivative)


if missing_reason("cpu") is None:
    _register()
