"""Argument checks of the RoI operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from dcnseg.errors import ConfigError, ShapeError
from dcnseg.ops.checks import (
    MAX_SIZE,
    Pair,
    check_choice,
    check_device,
    check_memory,
    is_integer,
    is_too_large,
    shape_text,
)

Corners: TypeAlias = Literal["torchvision", "rfcn"]
Mode: TypeAlias = Literal["paper", "mmcv", "mxnet"]

CORNERS: tuple[Corners, ...] = ("torchvision", "rfcn")
MODES: tuple[Mode, ...] = ("paper", "mmcv", "mxnet")
PS_MODES: tuple[Mode, ...] = ("paper", "mxnet")
SAMPLES_PER_PART = 4  # the default of `deform_ps_roi_pool`

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MAX_SCALE = 2.0**100  # larger values overflow float32
_MAX_SAMPLES = 2**16  # of a bin along an axis
_AXIS_BYTES = 32  # of a bin along an axis, in `dcnseg.ops.roi.geometry`
_NUMBER_TYPES = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)


def check_scale_and_gamma(spatial_scale: float, gamma: float = 0.0) -> None:
    """Raise a ConfigError unless 0 < spatial_scale < 2**100 and gamma is finite."""
    for name, value in (("spatial_scale", spatial_scale), ("gamma", gamma)):
        if isinstance(value, bool) or not isinstance(value, _NUMBER_TYPES):
            raise ConfigError(f"`{name}` is {value!r}; expected a number.")
    if not 0 < spatial_scale < _MAX_SCALE:
        raise ConfigError(
            f"`spatial_scale` is {spatial_scale}; expected a number above 0 and below 2**100, such "
            "as 1/16 for a map with an output stride of 16."
        )
    if not -math.inf < gamma < math.inf:  # math.isfinite breaks the graph of torch.compile
        raise ConfigError(f"`gamma` is {gamma}; expected a finite number, such as 0.1.")


def check_count(value: int, name: str, minimum: int = 1, maximum: int | None = None) -> None:
    """Raise a ConfigError unless `value` is an integer from `minimum` to `maximum`."""
    if not is_integer(value) or value < minimum or (maximum is not None and value > maximum):
        expected = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ConfigError(f"`{name}` is {value!r}; expected an integer {expected}.")


def check_deformable(
    mode: str, modes: Sequence[str], spatial_scale: float, gamma: float, sampling_ratio: int = 0
) -> None:
    """Raise a ConfigError unless the settings are valid for the mode."""
    check_choice(mode, "mode", modes)
    check_scale_and_gamma(spatial_scale, gamma)
    check_count(sampling_ratio, "sampling_ratio", 0, _MAX_SAMPLES)
    if mode == "paper" and sampling_ratio:
        raise ConfigError(
            f'`sampling_ratio` is {sampling_ratio}; mode="paper" samples every pixel and supports '
            'only 0. Use 0, mode="mmcv" or mode="mxnet".'
        )


def to_sampling_ratio(mode: str, samples_per_part: int) -> int:
    """Convert `samples_per_part` to the sampling ratio of the mode.

    Raises:
        ConfigError: `samples_per_part` is out of its range, or not the default in mode "paper".
    """
    check_count(samples_per_part, "samples_per_part", 1, _MAX_SAMPLES)
    if mode != "paper":
        return samples_per_part
    if samples_per_part != SAMPLES_PER_PART:
        raise ConfigError(
            f'`samples_per_part` is {samples_per_part}; mode="paper" samples every pixel and '
            f'supports only the default, {SAMPLES_PER_PART}. Use mode="mxnet".'
        )
    return 0


def check_regions(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> None:
    """Raise a ShapeError unless map and boxes have valid shapes, dtypes and devices."""
    _check_floating(input, "input", input)
    if input.dim() != 4:
        raise ShapeError(
            f"`input` has the shape {shape_text(input)}; expected 4 dimensions, [B, C, H, W]."
        )
    height, width = input.shape[2:]
    if not 1 <= height * width <= MAX_SIZE:
        raise ShapeError(
            f"`input` is {height}x{width} (height x width); expected 1 to {MAX_SIZE} pixels."
        )
    if isinstance(boxes, Tensor):
        _check_floating(boxes, "boxes", input)
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ShapeError(
                f"`boxes` has the shape {shape_text(boxes)}; expected [R, 5] with the columns "
                "batch index, x1, y1, x2, y2, or a list with one [Ri, 4] tensor per image."
            )
        return
    if not isinstance(boxes, (list, tuple)):
        raise ShapeError(
            f"`boxes` is a {type(boxes).__name__}; expected an [R, 5] tensor or a list with one "
            "[Ri, 4] tensor per image."
        )
    if len(boxes) != input.shape[0]:
        raise ShapeError(
            f"`boxes` is a list of {len(boxes)} tensors, but `input` has {input.shape[0]} images. "
            "Pass one tensor per image, [0, 4] for an image without boxes."
        )
    for i, each in enumerate(boxes):
        _check_floating(each, f"boxes[{i}]", input)
        if each.dim() != 2 or each.shape[1] != 4:
            raise ShapeError(
                f"`boxes[{i}]` has the shape {shape_text(each)}; expected [Ri, 4] with the columns "
                "x1, y1, x2, y2."
            )


def check_batch_indices(boxes: Tensor | Sequence[Tensor], batch: int) -> None:
    """Raise a ShapeError unless every batch index in a tensor of boxes is below `batch`.

    Only in eager mode: under torch.compile and CUDA graph capture the values cannot be read, and
    the operators treat such a box like one that is not finite.
    """
    if not isinstance(boxes, Tensor) or _is_unreadable(boxes):
        return
    index = boxes[:, 0]
    is_valid = (index >= 0) & (index < batch) & (index == index.floor())
    if is_valid.all():
        return
    first = int(is_valid.logical_not().nonzero()[0])
    expected = f"an integer from 0 to {batch - 1}" if batch else "no boxes"
    raise ShapeError(
        f"`boxes[{first}]` has the batch index {float(index[first]):g}; expected {expected}, "
        f"because `input` has {batch} images. The columns are batch index, x1, y1, x2, y2."
    )


def check_offset(
    offset: Tensor | None,
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    part_size: Pair,
    out_channels: int,
) -> None:
    """Raise a ShapeError unless `offset` is None or a valid [R, 2*classes, ph, pw]."""
    if offset is None:
        return
    _check_floating(offset, "offset", input)
    regions = _count_boxes(boxes)
    channels = offset.shape[1] if offset.dim() == 4 else 0
    if offset.dim() != 4 or (offset.shape[0], *offset.shape[2:]) != (regions, *part_size):
        raise ShapeError(
            f"`offset` has the shape {shape_text(offset)}; expected [{regions}, 2*classes, "
            f"{part_size[0]}, {part_size[1]}] for {regions} boxes of {part_size[0]}x{part_size[1]} "
            "parts."
        )
    classes = channels // 2
    if channels % 2 or not classes or out_channels % classes:
        raise ShapeError(
            f"`offset` has {channels} channels; expected 2 (x, y) per class, and a number of "
            f"classes that divides the {out_channels} output channels."
        )
    needed = offset.numel() * max(4, input.element_size())  # in position_dtype
    check_memory(
        needed, input.device, "A copy of `offset` of shape {} in pixels", list(offset.shape)
    )


def check_groups(input: Tensor, group_size: Pair, name: str) -> int:
    """Return the number of output channels; raise a ShapeError unless it is an integer."""
    groups = check_product(group_size, name)
    if input.shape[1] % groups:
        raise ShapeError(
            f"`input` has {input.shape[1]} channels; expected a multiple of "
            f"{group_size[0]}*{group_size[1]} = {groups}, the number of groups of `{name}`, "
            "because each group of bins has its own channels."
        )
    return input.shape[1] // groups


def check_product(size: Pair, name: str) -> int:
    """Return the number of bins, parts or groups of a box; raise a ShapeError above `MAX_SIZE`."""
    product = size[0] * size[1]
    if is_too_large(product, MAX_SIZE):
        raise ShapeError(
            f"`{name}` is {size[0]}x{size[1]} = {product}; expected a product of at most "
            f"{MAX_SIZE}."
        )
    return product


def check_parameters(count: int) -> None:
    """Raise a ShapeError if `count` parameters do not fit in memory."""
    like = torch.empty(0)  # the default device and dtype, which modules use
    check_memory(count * like.element_size(), like.device, "The parameters of `offset_branch`")


def check_output(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Pair,
    channels: int,
) -> None:
    """Raise a ShapeError if the output or the layout of its bins does not fit in memory."""
    bins, regions = check_product(output_size, "output_size"), _count_boxes(boxes)
    needed = regions * channels * bins * input.element_size()
    needed += (regions + 1) * sum(output_size) * _AXIS_BYTES
    what = "Pooling {} boxes to {}x{} bins of {} channels"
    check_memory(needed, input.device, what, regions, *output_size, channels)


def _count_boxes(boxes: Tensor | Sequence[Tensor]) -> int:
    if isinstance(boxes, Tensor):
        return boxes.shape[0]
    return sum(each.shape[0] for each in boxes)


def _check_floating(tensor: Tensor, name: str, input: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"`{name}` is a {type(tensor).__name__}; expected a tensor.")
    if tensor.dtype not in _DTYPES:
        raise ShapeError(
            f"`{name}` is {tensor.dtype}; expected float64, float32, bfloat16 or float16."
        )
    check_device(tensor, name, input)


def _is_unreadable(tensor: Tensor) -> bool:
    """Return whether the values are not available: in graphs, fake and meta tensors."""
    if torch.compiler.is_compiling() or tensor.is_meta or is_fake(tensor):
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
