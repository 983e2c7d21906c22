"""The native deformable convolution as torch sees it: its call, its shapes, its derivatives.

Entry point: `deform_conv2d_native`. The operators' schemas stand in cuda_ops/cpu/ops_cpu.cpp.
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

_unfused_gpus: set[int | None] = set()  # by index: where the fused kernel failed its self-test


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

    Arguments that do not fit together raise a RuntimeError, or a ShapeError where nothing is
    computed (on "meta" and in graphs), except that an empty `bias` or `mask` is taken for none.

    On a GPU, float32 is multiplied as in torch's convolutions, from tf32 where torch's settings
    say so, unless `allow_tf32` is given. Without `fused` the kernel that keeps its columns inside
    the chip is not taken.
    """
    position_dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    offset = _as_positions(offset, position_dtype)
    mask = offset.new_empty(0) if mask is None else _as_positions(mask, position_dtype)
    bias = input.new_empty(0) if bias is None else bias.contiguous()
    if input.is_cuda:
        offset, mask = offset.contiguous(), mask.contiguous()
    tensors = (dense(input), offset, mask, dense(weight), bias)
    with _without_autograd(tensors):
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


def _as_positions(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What is no floating-point tensor remains as it is, for the operator to refuse."""
    is_right = tensor.dtype == dtype or not tensor.is_floating_point()
    return tensor if is_right else tensor.to(dtype)


def _without_autograd(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Spare the way through the operator's derivative, which is in Python, where none is wanted."""
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or torch.overrides.has_torch_function(tensors)  # whose code may want gradients of its own
    ):
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def _allows_tf32(input: Tensor) -> bool:
    if not (input.is_cuda and input.dtype == torch.float32):
        return False
    if (
        torch.compiler.is_compiling()
    ):  # which can trace and guard the older of the two settings alone
        return torch.backends.cudnn.allow_tf32
    # The older one raises where the newer one says something else for recurrent networks.
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def _fake_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    *numbers: int,
) -> Tensor:
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _border, channels_last, *_ = numbers
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
    *numbers: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input_wanted, offset_wanted, mask_wanted, weight_wanted = numbers[7:11]
    return (
        torch.empty_like(input) if input_wanted else input.new_empty(0),
        offset.new_empty(offset.shape if offset_wanted else 0),
        mask.new_empty(mask.shape if mask_wanted else 0),
        torch.empty_like(weight) if weight_wanted else weight.new_empty(0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, mask, weight, _bias, *numbers, _channels_last, allow_tf32, _fused = inputs
    ctx.save_for_backward(input, offset, mask, weight)
    ctx.numbers, ctx.allow_tf32 = numbers, allow_tf32


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, mask, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    grads: list[Tensor | None] = [None] * 5
    if any(wanted):
        grad = dense(grad) if grad.is_cuda else grad
        made = torch.ops.dcnseg.deform_conv2d_backward(
            grad, input, offset, mask, weight, *ctx.numbers, *wanted, ctx.allow_tf32
        )
        grads[:4] = [
            tensor if is_wanted else None for tensor, is_wanted in zip(made, wanted, strict=True)
        ]
    if ctx.needs_input_grad[4]:
        grads[4] = grad.sum((0, 2, 3))
    return (*grads, *(None,) * 10)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NativeOpsError(
        'The native deform_conv2d has no second derivative; pass backend="reference" for one.'
    )


def cuda_self_test(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot be trusted on this device; None if small cases come out right.

    Where only the fused kernel goes wrong, the others serve without it.
    """
    reason = run_self_test(_cases(fused=False), device)
    if reason is None:
        fused_reason = run_self_test(_cases(fused=True), device)
        if fused_reason is not None:
            _unfused_gpus.add(device.index)
            warnings.warn(
                f"dcnseg takes its slower kernels for deform_conv2d: the fused one {fused_reason}.",
                RuntimeWarning,
                stacklevel=2,
            )
    return reason


def _cases(fused: bool) -> list[SmallCase]:
    """Both memory formats; vectors of 16 bytes, and channels that no vector fits."""
    kinds = [  # dtype, channels, groups, outputs, has_mask, channels_last
        (torch.float32, 64, 2, 6, True, True),
        (torch.bfloat16, 64, 1, 6, False, False),
        (torch.float16, 64, 1, 6, True, True),
    ]
    if fused:  # which has kernels for up to 64, 128 and 256 outputs
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        wide = [(dtype, outputs) for dtype in dtypes for outputs in (128, 256)]
        kinds += [(dtype, 64, 1, outputs, True, outputs == 256) for dtype, outputs in wide]
    else:
        kinds += [(torch.float64, 4, 1, 6, True, False), (torch.bfloat16, 6, 2, 6, True, True)]
    return [SmallCase(kind[0], partial(_small_case, *kind, fused=fused)) for kind in kinds]


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
    """Output and gradients of a case with offsets on both sides of the map's edges."""
    generator = torch.Generator().manual_seed(0)
    position_dtype = torch.promote_types(dtype, torch.float32)

    def leaf(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return (scale * values).to(device, dtype).requires_grad_()

    size = (13, 11)  # with two images more positions than two tiles of 128
    input = leaf(2, channels, *size)
    weight = leaf(outputs, channels // groups, 3, 3, scale=0.1)  # float16 ends at 65504
    offset = leaf(2, 18 * groups, *size, dtype=position_dtype)
    mask = leaf(2, 9 * groups, *size, dtype=position_dtype) if has_mask else None
    bias = leaf(outputs) if has_mask else None
    image = input.contiguous(memory_format=memory_format(channels_last))
    arguments = (image, offset, weight, bias, Window((1, 1), (1, 1), (1, 1)), mask)
    if native:
        # Whatever is allowed now: tf32 may be allowed later, and the test is not made again.
        allow_tf32 = True if fused else None
        output = deform_conv2d_native(*arguments, fused=fused, allow_tf32=allow_tf32)
    else:
        output = deform_conv2d_reference(*arguments)
    wanted = [tensor for tensor in (input, offset, weight, bias, mask) if tensor is not None]
    if not has_mask:
        wanted = [offset, weight]  # as in a first layer, whose input wants no gradient
    total = output.to(position_dtype).square().sum()
    return [output, *torch.autograd.grad(total, wanted)]


def _register() -> None:
    """Give the native operators their shapes under torch.compile and their derivatives."""
    library = torch.library
    library.register_fake("dcnseg::deform_conv2d", _fake_deform_conv2d)
    library.register_fake("dcnseg::deform_conv2d_backward", _fake_deform_conv2d_backward)
    library.register_autograd("dcnseg::deform_conv2d", _backward, setup_context=_save_for_backward)
    library.register_autograd("dcnseg::deform_conv2d_backward", _refuse_second_derivative)


if missing_reason("cpu") is None:
    _register()
