"""What the arguments of the RoI operators must fulfil."""

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
    MOST_SIZE,
    Pair,
    check_choice,
    check_device,
    check_memory,
    exceeds,
    is_integer,
    shape_text,
)

Corners: TypeAlias = Literal["torchvision", "rfcn"]
Mode: TypeAlias = Literal["paper", "mmcv", "mxnet"]

CORNERS: tuple[Corners, ...] = ("torchvision", "rfcn")
MODES: tuple[Mode, ...] = ("paper", "mmcv", "mxnet")
PS_MODES: tuple[Mode, ...] = ("paper", "mxnet")
SAMPLES_PER_PART = 4  # the default of `deform_ps_roi_pool`

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_PIXELS = MOST_SIZE  # the numbers of pixels are int32
_MOST_SCALE = 2.0**100  # beyond it float32 is infinite
_MOST_SAMPLES = 2**16  # of a bin along an axis
_AXIS_BYTES = 32  # of a bin along an axis, while `roi_geometry` lays it out
_NUMBERS = (int, float, np.integer, np.floating, torch.SymInt, torch.SymFloat)


def check_numbers(spatial_scale: float, gamma: float = 0.0) -> None:
    """Raise a ConfigError unless the scale is above 0 and below 2**100, and gamma finite."""
    for name, number in (("spatial_scale", spatial_scale), ("gamma", gamma)):
        if isinstance(number, bool) or not isinstance(number, _NUMBERS):
            raise ConfigError(f"`{name}` is {number!r}; expected a number.")
    if not 0 < spatial_scale < _MOST_SCALE:
        raise ConfigError(
            f"`spatial_scale` is {spatial_scale}; expected a number above 0 and below 2**100, such "
            "as 1/16 for a map with a stride of 16 pixels."
        )
    if not -math.inf < gamma < math.inf:  # math.isfinite breaks the graph of torch.compile
        raise ConfigError(f"`gamma` is {gamma}; expected a finite number, such as 0.1.")


def check_count(value: int, name: str, least: int = 1, most: int | None = None) -> None:
    """Raise a ConfigError unless `value` is an integer from `least` to `most`."""
    if not is_integer(value) or value < least or (most is not None and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"`{name}` is {value!r}; expected an integer {expected}.")


def check_deformable(
    mode: str, modes: Sequence[str], spatial_scale: float, gamma: float, sampling_ratio: int = 0
) -> None:
    """Raise a ConfigError unless the settings are in their ranges and fit the mode."""
    check_choice(mode, "mode", modes)
    check_numbers(spatial_scale, gamma)
    check_count(sampling_ratio, "sampling_ratio", 0, _MOST_SAMPLES)
    if mode == "paper" and sampling_ratio:
        raise ConfigError(
            f'`sampling_ratio` is {sampling_ratio}; the mode "paper" samples every pixel and takes '
            '0 alone. Choose the mode "mmcv" or "mxnet".'
        )


def ratio_of_parts(mode: str, samples_per_part: int) -> int:
    """The sampling ratio that `samples_per_part` stands for in this mode.

    Raises:
        ConfigError: It is out of its range, or other than the default where the mode is "paper".
    """
    check_count(samples_per_part, "samples_per_part", 1, _MOST_SAMPLES)
    if mode != "paper":
        return samples_per_part
    if samples_per_part != SAMPLES_PER_PART:
        raise ConfigError(
            f'`samples_per_part` is {samples_per_part}; the mode "paper" samples every pixel and '
            f'takes the default, {SAMPLES_PER_PART}, alone. Choose the mode "mxnet".'
        )
    return 0


def check_regions(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> None:
    """The map and the boxes: dimensions, dtypes, devices."""
    _check_floating(input, "input", input)
    if input.dim() != 4:
        raise ShapeError(
            f"`input` has {input.dim()} dimensions, {shape_text(input)}; expected 4, [B, C, H, W]."
        )
    height, width = input.shape[2:]
    if not 1 <= height * width <= _MOST_PIXELS:
        raise ShapeError(
            f"`input` is {height}x{width} (height x width); expected 1 to {_MOST_PIXELS} pixels."
        )
    if isinstance(boxes, Tensor):
        _check_floating(boxes, "boxes", input)
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ShapeError(
                f"`boxes` is {shape_text(boxes)}; expected [R, 5] with columns batch index, x1, "
                "y1, x2, y2, or a list with one [Ri, 4] tensor per image."
            )
        return
    if not isinstance(boxes, (list, tuple)):
        raise ShapeError(
            f"`boxes` is a {type(boxes).__name__}; expected a tensor [R, 5] or a list with one "
            "[Ri, 4] tensor per image."
        )
    if len(boxes) != input.shape[0]:
        raise ShapeError(
            f"`boxes` is a list of {len(boxes)} tensors and `input` has {input.shape[0]} images; "
            "give one tensor per image, [0, 4] where an image has no box."
        )
    for i, each in enumerate(boxes):
        _check_floating(each, f"boxes[{i}]", input)
        if each.dim() != 2 or each.shape[1] != 4:
            raise ShapeError(
                f"`boxes[{i}]` is {shape_text(each)}; expected [R, 4] with columns x1, y1, x2, y2."
            )


def check_batch_indices(boxes: Tensor | Sequence[Tensor], batch: int) -> None:
    """Raise a ShapeError unless each box of a tensor belongs to one of `batch` images.

    In eager mode alone: under torch.compile and CUDA graph capture nothing can be read, and the
    operators take such a box as one that is not finite.
    """
    if not isinstance(boxes, Tensor) or _is_unreadable(boxes):
        return
    index = boxes[:, 0]
    good = (index >= 0) & (index < batch) & (index == index.floor())
    if good.all():
        return
    number = int(good.logical_not().nonzero()[0])
    expected = f"a whole number from 0 to {batch - 1}" if batch else "no boxes"
    raise ShapeError(
        f"`boxes[{number}]` has the batch index {float(index[number]):g}; `input` has {batch} "
        f"images, so expected {expected}. Columns are batch index, x1, y1, x2, y2."
    )


def check_offset(
    offset: Tensor | None,
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    part_size: Pair,
    out_channels: int,
) -> None:
    """[R, 2*classes, ph, pw] or None; the classes divide the output channels."""
    if offset is None:
        return
    _check_floating(offset, "offset", input)
    regions = _count(boxes)
    channels = offset.shape[1] if offset.dim() == 4 else 0
    if offset.dim() != 4 or (offset.shape[0], *offset.shape[2:]) != (regions, *part_size):
        raise ShapeError(
            f"`offset` is {shape_text(offset)}; {regions} boxes with {part_size[0]}x{part_size[1]} "
            f"parts need [{regions}, 2*classes, {part_size[0]}, {part_size[1]}]."
        )
    classes = channels // 2
    if channels % 2 or not classes or out_channels % classes:
        raise ShapeError(
            f"`offset` has {channels} channels; expected 2 (x, y) for each class, and a number of "
            f"classes that divides the {out_channels} output channels."
        )
    needed = offset.numel() * max(4, input.element_size())  # in the dtype of positions
    check_memory(needed, input.device, "The shifts of `offset` {}", list(offset.shape))


def check_groups(input: Tensor, group_size: Pair, name: str) -> int:
    """Channels of the output; a ShapeError unless the groups divide those of the input."""
    groups = check_product(group_size, name)
    if input.shape[1] % groups:
        raise ShapeError(
            f"`input` has {input.shape[1]} channels, which the {group_size[0]}*{group_size[1]} = "
            f"{groups} groups of `{name}` do not divide; each group of bins reads channels of its "
            "own."
        )
    return input.shape[1] // groups


def check_product(size: Pair, name: str) -> int:
    """How many bins, parts or groups a box has; raise a ShapeError if an int32 cannot hold it."""
    product = size[0] * size[1]
    if exceeds(product, MOST_SIZE):
        raise ShapeError(
            f"`{name}` is {size[0]}x{size[1]}, that is {product}; expected at most {MOST_SIZE} in "
            "all."
        )
    return product


def check_parameters(count: int) -> None:
    """Raise a ShapeError if a module's new parameters cannot be allocated."""
    like = torch.empty(0)  # where, and in which dtype, modules make theirs
    check_memory(count * like.element_size(), like.device, "The parameters of `offset_branch`")


def check_output(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Pair,
    channels: int,
) -> None:
    """Raise a ShapeError if the output, of so many channels, or its bins cannot be allocated."""
    bins, regions = check_product(output_size, "output_size"), _count(boxes)
    needed = regions * channels * bins * input.element_size()
    needed += (regions + 1) * sum(output_size) * _AXIS_BYTES
    what = "Pooling {} boxes to {}x{} bins of {} channels"
    check_memory(needed, input.device, what, regions, *output_size, channels)


def _count(boxes: Tensor | Sequence[Tensor]) -> int:
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
    """Whether the values of a tensor cannot be read here and now."""
    if torch.compiler.is_compiling() or tensor.is_meta or is_fake(tensor):
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
