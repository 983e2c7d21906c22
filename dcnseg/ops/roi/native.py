"""The native RoI operators: their calls, fake implementations and autograd formulas.

Entry points: `roi_pool_native`, `roi_avg_pool_native`, `deform_roi_pool_native`, with the arguments
of the functions that end in _reference. The schemas are defined in cuda_ops/cpu/ops_cpu.cpp.
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
from dcnseg.ops.self_test import run_self_test

_BORDERS = {"paper": 0, "mmcv": 1, "mxnet": 2}  # `Border` in cuda_ops/include/bilinear.h


def roi_pool_native(input: Tensor, bins: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Maximum of every bin; see `roi_pool_reference`."""
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


def _fake_roi_avg_pool(
    input: Tensor, bins: Tensor, kh: int, kw: int, gh: int, gw: int, channels_last: bool
) -> Tensor:
    return torch.empty(
        (bins.shape[0], input.shape[1] // gh // gw, kh, kw),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(channels_last),
    )


def _fake_roi_pool(
    input: Tensor, bins: Tensor, kh: int, kw: int, channels_last: bool
) -> tuple[Tensor, Tensor]:
    output = _fake_roi_avg_pool(input, bins, kh, kw, 1, 1, channels_last)
    return output, torch.empty_like(output, dtype=torch.int32)


def _fake_deform_roi_pool(input: Tensor, samples: Tensor, shift: Tensor, *settings: int) -> Tensor:
    kh, kw, gh, gw, _border, channels_last = settings
    return _fake_roi_avg_pool(input, samples, kh, kw, gh, gw, bool(channels_last))


def _fake_input_gradient(grad: Tensor, input: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(input)


def _fake_deform_roi_pool_backward(
    grad: Tensor, input: Tensor, samples: Tensor, shift: Tensor, *settings: int
) -> tuple[Tensor, Tensor]:
    needs_input, needs_shift = settings[-2:]
    return (
        torch.empty_like(input) if needs_input else input.new_empty(0),
        shift.new_empty(shift.shape if needs_shift else 0),
    )


def _save_roi_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, bins, _kh, _kw, ctx.channels_last = inputs
    ctx.save_for_backward(input, bins, output[1])
    ctx.set_materialize_grads(False)  # no gradient for argmax


def _save_roi_avg_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, bins, *ctx.settings, ctx.channels_last = inputs
    ctx.save_for_backward(input, bins)


def _save_deform_roi_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, samples, shift, *ctx.settings, ctx.channels_last = inputs
    ctx.save_for_backward(input, samples, shift)


def _grad_for_kernel(ctx: Any, grad: Tensor) -> Tensor:
    """Convert to the output's memory format for CUDA kernels; CPU kernels support any strides."""
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
    return torch.ops.dcnseg.roi_avg_pool_backward(grad, input, bins, *ctx.settings), *(None,) * 6


def _deform_roi_pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, samples, shift = ctx.saved_tensors
    needs_input, _, needs_shift = ctx.needs_input_grad[:3]
    if not (needs_input or needs_shift):
        return (None,) * 9
    grad = _grad_for_kernel(ctx, grad)
    input_grad, shift_grad = torch.ops.dcnseg.deform_roi_pool_backward(
        grad, input, samples, shift, *ctx.settings, needs_input, needs_shift
    )
    return (
        input_grad if needs_input else None,
        None,
        # Without boxes the kernels treat the empty shift as None and do not return its shape.
        shift_grad.reshape(shift.shape) if needs_shift else None,
        *(None,) * 6,
    )


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NativeOpsError(
        'The native RoI operators are not twice differentiable. Pass backend="reference".'
    )


def _self_test(kind: str, device: torch.device) -> str | None:
    """Run the self-test of the CUDA kernels; see `run_self_test`."""
    settings: list[tuple[torch.dtype, bool, Mode]] = [
        (torch.float32, False, "paper"),
        (torch.float32, True, "mxnet"),
        (torch.bfloat16, False, "mmcv"),
    ]
    return run_self_test([partial(_small_case, kind, *each) for each in settings], device)


roi_pool_self_test = partial(_self_test, "max")
roi_avg_pool_self_test = partial(_self_test, "avg")  # also of `ps_roi_pool`
deform_roi_pool_self_test = partial(_self_test, "deform")  # also of `deform_ps_roi_pool`


def _small_case(
    kind: str, dtype: torch.dtype, grouped: bool, mode: Mode, native: bool, device: torch.device
) -> list[Tensor]:
    """Return output and gradients of a case with boxes that cross the borders of the map."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        return values.to(device, dtype).requires_grad_()

    size_hw, k = (8, 7), (2, 2)
    input, offset = leaf(2, 8, *size_hw), leaf(3, 2, *k, dtype=torch.float32)
    boxes = [[0, -3, 1, 9, 15], [1, 4, 2, 17, 9], [1, 2.5, 3, 7, 12.5]]
    regions = locate_regions(torch.tensor(boxes, device=device, dtype=torch.float32), input)
    group_size = k if grouped else (1, 1)
    leaves = [input]
    if kind == "deform":
        samples, size = make_samples(mode, regions, k, 0.5, size_hw, 0)
        pool = deform_roi_pool_native if native else deform_roi_pool_reference
        output = pool(input, samples, make_shift(offset, size, 0.1), k, group_size, mode)
        leaves.append(offset)
    elif kind == "max":
        pool_max = roi_pool_native if native else roi_pool_reference
        output = pool_max(input, make_bins(regions, k, 0.5, size_hw), k)
    else:
        average = roi_avg_pool_native if native else roi_avg_pool_reference
        output = average(input, make_bins(regions, k, 0.5, size_hw), k, group_size)
    return [output, *torch.autograd.grad(output.float().square().sum(), leaves)]


def _register() -> None:
    """Register fake implementations and autograd formulas."""
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
