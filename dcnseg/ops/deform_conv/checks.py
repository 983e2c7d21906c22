"""Argument checks of the deformable convolution."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from dcnseg.errors import ShapeError
from dcnseg.ops.checks import (
    MAX_SIZE,
    Pair,
    check_choice,
    check_device,
    check_memory,
    is_too_large,
    make_pair,
    shape_text,
)

Border: TypeAlias = Literal["zero", "dcnv1"]


class Window(NamedTuple):
    """Geometry of a convolution, each pair (y, x) in pixels, and the border of the input."""

    stride: Pair
    padding: Pair
    dilation: Pair
    border: Border = "zero"


def make_window(
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    border: Border,
) -> Window:
    """Convert the arguments of an operator to a Window.

    Raises:
        ShapeError: An argument is not one or two integers in its range.
        ConfigError: `border` is neither "zero" nor "dcnv1".
    """
    check_choice(border, "border", ("zero", "dcnv1"))
    return Window(
        make_pair(stride, "stride"),
        make_pair(padding, "padding", 0),
        make_pair(dilation, "dilation"),
        border,
    )


def check_arguments(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    mask: Tensor | None,
) -> None:
    """Raise a ShapeError unless shapes, dtypes and devices agree."""
    _check_tensors(input, offset, weight, bias, mask)
    batch, channels, height, width = input.shape
    out_channels, group_channels, kh, kw = weight.shape
    taps = kh * kw
    if out_channels < 1 or group_channels < 1 or taps < 1 or channels % group_channels:
        raise ShapeError(
            f"`weight` has the shape {shape_text(weight)} and `input` has {channels} channels; "
            "expected [C_out, C/groups, kh, kw] without a size of 0, whose second size divides "
            f"{channels}."
        )
    groups = channels // group_channels
    if groups < 1 or out_channels % groups:
        raise ShapeError(
            f"`weight` has {out_channels} output channels; expected a multiple of the number of "
            f"groups, which is {channels} / {group_channels} = {groups}."
        )
    _check_offset_channels(offset, channels, (kh, kw), mask)
    size_hw = _out_size((height, width), (kh, kw), window)
    # `min` would add a guard to graphs with dynamic shapes: which of the sizes is smaller.
    if height < 1 or width < 1 or size_hw[0] < 1 or size_hw[1] < 1:
        raise ShapeError(
            f"`input` is {height}x{width} (height x width), which is too small for a {kh}x{kw} "
            f"kernel with dilation {window.dilation} and padding {window.padding}."
        )
    if is_too_large((height + 2) * width, MAX_SIZE - 1):  # pixel indices are int32
        raise ShapeError(
            f"`input` is {height}x{width} (height x width); expected (height + 2) * width to be "
            f"less than {MAX_SIZE}."
        )
    for name, tensor in (("offset", offset), ("mask", mask)):
        if tensor is not None and (tensor.shape[0], *tensor.shape[2:]) != (batch, *size_hw):
            raise ShapeError(
                f"`{name}` has the shape {shape_text(tensor)}; expected "
                f"[{batch}, {tensor.shape[1]}, {size_hw[0]}, {size_hw[1]}] for an input of "
                f"{shape_text(input)}, a {kh}x{kw} kernel, stride {window.stride}, padding "
                f"{window.padding} and dilation {window.dilation}."
            )
    if bias is not None and bias.shape[0] != out_channels:
        raise ShapeError(
            f"`bias` has {bias.shape[0]} elements, but `weight` has {out_channels} output channels."
        )
    needed = batch * out_channels * size_hw[0] * size_hw[1] * input.element_size()
    what = "An output of shape [{}, {}, {}, {}]"
    check_memory(needed, input.device, what, batch, out_channels, *size_hw)


def _check_tensors(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> None:
    """Check dtypes, devices and numbers of dimensions."""
    for name, tensor, dim in (
        ("input", input, 4),
        ("offset", offset, 4),
        ("weight", weight, 4),
        ("bias", bias, 1),
        ("mask", mask, 4),
    ):
        if tensor is None:
            continue
        if tensor.dim() != dim:
            raise ShapeError(
                f"`{name}` has the shape {shape_text(tensor)}; expected a {dim}-dimensional tensor."
            )
        check_device(tensor, name, input)
        if not tensor.is_floating_point():
            raise ShapeError(f"`{name}` is {tensor.dtype}; expected a floating-point tensor.")
        if name in ("weight", "bias") and tensor.dtype != input.dtype:
            raise ShapeError(
                f"`{name}` is {tensor.dtype}, but `input` is {input.dtype}. Convert both to the "
                "same dtype, or use autocast."
            )


def _check_offset_channels(
    offset: Tensor, channels: int, kernel_size: Pair, mask: Tensor | None
) -> None:
    """Check the channels of `offset` and `mask`, which determine the number of offset groups."""
    kh, kw = kernel_size
    taps = kh * kw
    given = offset.shape[1]
    offset_groups = given // (2 * taps)
    if given % (2 * taps) or not offset_groups:
        hint = ""
        if given % (3 * taps) == 0 and given:
            groups = given // (3 * taps)
            hint = (
                f" With offset_groups={groups} that is 2*{groups}*{taps} = {2 * groups * taps}. "
                "Pass the modulation as `mask` instead of concatenating it."
            )
        raise ShapeError(
            f"`offset` has {given} channels; a {kh}x{kw} kernel needs 2*{taps} = {2 * taps} per "
            f"offset group.{hint}"
        )
    if channels % offset_groups:
        raise ShapeError(
            f"`offset` has {given} channels, which is {offset_groups} offset groups of a "
            f"{kh}x{kw} kernel; {channels} input channels are not divisible by {offset_groups}."
        )
    if mask is not None and mask.shape[1] != offset_groups * taps:
        raise ShapeError(
            f"`mask` has {mask.shape[1]} channels; a {kh}x{kw} kernel with "
            f"offset_groups={offset_groups} needs {offset_groups}*{taps} = {offset_groups * taps}."
        )


def _out_size(size_hw: Pair, kernel_size: Pair, window: Window) -> Pair:
    height, width = (
        (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, padding, dilation in zip(
            size_hw, kernel_size, window.stride, window.padding, window.dilation, strict=True
        )
    )
    return height, width
