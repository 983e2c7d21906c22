"""The native RoI operators as torch sees them: their calls, their shapes, their derivatives.

Entry points: `roi_pool_native`, `roi_avg_pool_native`, `deform_roi_pool_native`, with the arguments
of their namesakes ending in _reference. The schemas stand in cuda_ops/cpu/ops_cpu.cpp.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dcnseg.errors import NativeOpsError
from dcnseg.ops._native import missing_reason
from dcnseg.ops.layout import dense, is_channels_last, memory_format
from dcnseg.ops.roi.checks import Mode
from dcnseg.ops.roi.deformable_reference import deform_roi_pool_reference
from dcnseg.ops.roi.geometry import locate_regions, make_bins, make_samples, make_shift
from dcnseg.ops.roi.reference import roi_avg_pool_reference, roi_pool_reference
from dcnseg.ops.self_test import SmallCase, run_self_test

_BORDERS = {"paper": 0, "mmcv": 1, "mxnet": 2}  # `Border` in cuda_ops/include/bilinear.h


def roi_pool_native(input: Tensor, bins: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Largest value of every bin; see `roi_pool_reference`."""
    pixels = dense(input)
    output: Tensor
    output, _ = torch.ops.dcnseg.roi_pool(pixels, bins, *output_size, is_channels_last(pixels))
    return output


def roi_avg_pool_native(
    input: Tensor, bins: Tensor, output_size: tuple[int, int], group_size: tuple[int, int] = (1, 1)
) -> Tensor:
    """Mean of every bin; see `roi_avg_pool_reference`."""
    pixels = dense(input)
    output: Tensor = torch.ops.dcnseg.roi_avg_pool(
        pixels, bins, *output_size, *group_size, is_channels_last(pixels)
    )
    return output


def deform_roi_pool_native(
    input: Tensor,
    samples: Tensor,
    shift: Tensor | None,
    output_size: tuple[int, int],
    group_size: tuple[int, int],
    mode: Mode,
) -> Tensor:
    """Mean of displaced bilinear samples; see `deform_roi_pool_reference`."""
    pixels = dense(input)
    shift = samples.new_empty(0) if shift is None else shift.contiguous()
    output: Tensor = torch.ops.dcnseg.deform_roi_pool(
        pixels, samples, shift, *output_size, *group_size, _BORDERS[mode], is_channels_last(pixels)
    )
    return output


def _empty_output(
    input: Tensor, bins: Tensor, size: tuple[int, ...], channels_last: bool
) -> Tensor:
    kh, kw, *group_size = size
    channels = input.shape[1]
    for groups in group_size:
        channels = channels // groups
    return torch.empty(
        (bins.shape[0], channels, kh, kw),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(channels_last),
    )


def _fake_roi_pool(
    input: Tensor, bins: Tensor, kh: int, kw: int, channels_last: bool
) -> tuple[Tensor, Tensor]:
    output = _empty_output(input, bins, (kh, kw), channels_last)
    return output, torch.empty_like(output, dtype=torch.int32)


def _fake_roi_avg_pool(input: Tensor, bins: Tensor, *numbers: int) -> Tensor:
    *size, channels_last = numbers
    return _empty_output(input, bins, tuple(size), bool(channels_last))


def _fake_deform_roi_pool(input: Tensor, samples: Tensor, shift: Tensor, *numbers: int) -> Tensor:
    *size, _border, channels_last = numbers
    return _empty_output(input, samples, tuple(size), bool(channels_last))


def _fake_input_gradient(grad: Tensor, input: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(input)


def _fake_deform_roi_pool_backward(
    grad: Tensor, input: Tensor, samples: Tensor, shift: Tensor, *numbers: int
) -> tuple[Tensor, Tensor]:
    input_wanted, shift_wanted = numbers[-2:]
    return (
        torch.empty_like(input) if input_wanted else input.new_empty(0),
        shift.new_empty(shift.shape if shift_wanted else 0),
    )


def _save_roi_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, bins, _kh, _kw, ctx.channels_last = inputs
    ctx.save_for_backward(input, bins, output[1])
    ctx.set_materialize_grads(False)  # argmax has no gradient, not one of zeros


def _save_roi_avg_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, bins, *ctx.numbers, ctx.channels_last = inputs
    ctx.save_for_backward(input, bins)


def _save_deform_roi_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, samples, shift, *ctx.numbers, ctx.channels_last = inputs
    ctx.save_for_backward(input, samples, shift)


def _grad_for_kernel(ctx: Any, grad: Tensor) -> Tensor:
    """CUDA kernels read the gradient in the layout of the output; the CPU's take any strides."""
    if not grad.is_cuda:
        return grad
    return grad.contiguous(memory_format=memory_format(ctx.channels_last))


def _roi_pool_backward(
    ctx: Any, grad: Tensor | None, _argmax_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    input, bins, argmax = ctx.saved_tensors
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 5
    grad = _grad_for_kernel(ctx, grad)
    return torch.ops.dcnseg.roi_pool_backward(grad, input, bins, argmax), *(None,) * 4


def _roi_avg_pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, bins = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return (None,) * 7
    grad = _grad_for_kernel(ctx, grad)
    return torch.ops.dcnseg.roi_avg_pool_backward(grad, input, bins, *ctx.numbers), *(None,) * 6


def _deform_roi_pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, samples, shift = ctx.saved_tensors
    input_wanted, _, shift_wanted = ctx.needs_input_grad[:3]
    if not (input_wanted or shift_wanted):
        return (None,) * 9
    grad = _grad_for_kernel(ctx, grad)
    input_grad, shift_grad = torch.ops.dcnseg.deform_roi_pool_backward(
        grad, input, samples, shift, *ctx.numbers, input_wanted, shift_wanted
    )
    return (
        input_grad if input_wanted else None,
        None,
        # No boxes, no elements: the kernels then take the shift for absent, and lose its shape.
        shift_grad.reshape(shift.shape) if shift_wanted else None,
        *(None,) * 6,
    )


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NativeOpsError(
        'The native RoI operators have no second derivative; pass backend="reference" for one.'
    )


def roi_pool_self_test(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot be trusted on this device; None if small cases come out right."""
    return _self_test("max", device)


def roi_avg_pool_self_test(device: torch.device) -> str | None:
    """As `roi_pool_self_test`, for `roi_avg_pool` and `ps_roi_pool`."""
    return _self_test("avg", device)


def deform_roi_pool_self_test(device: torch.device) -> str | None:
    """As `roi_pool_self_test`, for `deform_roi_pool` and `deform_ps_roi_pool`."""
    return _self_test("deform", device)


def _self_test(kind: str, device: torch.device) -> str | None:
    settings: list[tuple[torch.dtype, bool, Mode]] = [
        (torch.float32, False, "paper"),
        (torch.float32, True, "mxnet"),
        (torch.bfloat16, False, "mmcv"),
    ]
    cases = []
    for dtype, grouped, mode in settings:
        run = partial(_small_case, kind=kind, dtype=dtype, grouped=grouped, mode=mode)
        cases.append(SmallCase(dtype, run))
    return run_self_test(cases, device)


def _small_case(
    native: bool,
    device: torch.device,
    *,
    kind: str,
    dtype: torch.dtype,
    grouped: bool,
    mode: Mode,
) -> list[Tensor]:
    """Output and gradients of a case with boxes on both sides of the map's edges."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return values.to(device, dtype).requires_grad_()

    size_hw, k = (8, 7), (2, 2)
    input, offset = leaf(2, 8, *size_hw), leaf(3, 2, *k, dtype=torch.float32)
    boxes = [[0, -3, 1, 9, 15], [1, 4, 2, 17, 9], [1, 2.5, 3, 7, 12.5]]
    place = torch.tensor(boxes, device=device, dtype=torch.float32)
    regions = locate_regions(place, input)
    group_size = k if grouped else (1, 1)
    wanted = [input]
    if kind == "deform":
        samples, size = make_samples(mode, regions, k, 0.5, size_hw, 0)
        pool = deform_roi_pool_native if native else deform_roi_pool_reference
        output = pool(input, samples, make_shift(offset, size, 0.1), k, group_size, mode)
        wanted.append(offset)
    else:
        bins = make_bins(regions, k, 0.5, size_hw)
        if kind == "max":
            output = (roi_pool_native if native else roi_pool_reference)(input, bins, k)
        else:
            average = roi_avg_pool_native if native else roi_avg_pool_reference
            output = average(input, bins, k, group_size)
    return [output, *torch.autograd.grad(output.float().square().sum(), wanted)]


def _register() -> None:
    """Give the native operators their shapes under torch.compile and their derivatives."""
    library = torch.library
    library.register_fake("dcnseg::roi_pool", _fake_roi_pool)
    library.register_fake("dcnseg::roi_avg_pool", _fake_roi_avg_pool)
    library.register_fake("dcnseg::deform_roi_pool", _fake_deform_roi_pool)
    library.register_fake("dcnseg::roi_pool_backward", _fake_input_gradient)
    library.register_fake("dcnseg::roi_avg_pool_backward", _fake_input_gradient)
    library.register_fake("dcnseg::deform_roi_pool_backward", _fake_deform_roi_pool_backward)
    for name, backward, save in (
        ("roi_pool", _roi_pool_backward, _save_roi_pool),
        ("roi_avg_pool", _roi_avg_pool_backward, _save_roi_avg_pool),
        ("deform_roi_pool", _deform_roi_pool_backward, _save_deform_roi_pool),
    ):
        library.register_autograd(f"dcnseg::{name}", backward, setup_context=save)
        library.register_autograd(f"dcnseg::{name}_backward", _refuse_second_derivative)


if missing_reason("cpu") is None:
    _register()
