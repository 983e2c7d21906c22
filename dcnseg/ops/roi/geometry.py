"""Where regions of interest (RoIs) lie and sample: boxes to bins, samples and shifts, in torch.

The native code and the plain PyTorch code pool what this file lays out, so that both read the same
pixels on every device. Entry points: `locate_regions`, then `make_bins` or `make_samples`, and
`make_shift`. Everything is a torch operation on small [R, ...] tensors in `position_dtype`.

R regions; k is kh or kw. An axis pair is (y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcnseg.ops.roi.checks import Corners, Mode

# Coordinates go no further than this, so that no sum or product of a few of them overflows float32.
_FAR = 2.0**100

_MXNET_SAMPLES = 4  # along an axis of a bin, where the caller gives no number


class Regions(NamedTuple):
    """Boxes as they came, in pixels of the image; a box that is not finite lies at 0."""

    image: Tensor  # [R], the batch index, or -1 for a box that is not finite
    low: Tensor  # [R, 2], (y1, x1)
    high: Tensor  # [R, 2], (y2, x2)


class Extent(NamedTuple):
    """Where regions lie in pixels of the map."""

    start: Tensor  # [R, 2]
    size: Tensor  # [R, 2]


def position_dtype(input: Tensor) -> torch.dtype:
    """Positions are computed in float32 at least."""
    return torch.promote_types(input.dtype, torch.float32)


def locate_regions(boxes: Tensor | Sequence[Tensor], input: Tensor) -> Regions:
    """Take checked boxes apart. They get no gradient, as in torchvision and mmcv.

    Under torch.compile and CUDA graph capture nobody has looked at the batch indices: one that
    names no image makes its box a bad one.
    """
    dtype = position_dtype(input)
    if isinstance(boxes, Tensor):
        index, corners = boxes.detach()[:, 0], boxes.detach()[:, 1:]
        known = (index >= 0) & (index < input.shape[0]) & (index == index.floor())
    else:
        corners = torch.cat([each.detach() for each in boxes]) if boxes else input.new_empty(0, 4)
        each_index = [
            corners.new_full((each.shape[0],), i, dtype=dtype) for i, each in enumerate(boxes)
        ]
        index = torch.cat(each_index) if boxes else corners.new_empty(0, dtype=dtype)
        known = index >= 0
    good = known & corners.isfinite().all(1)
    corners = _limit(torch.where(good[:, None], corners.to(dtype), 0))
    image = torch.where(good, index.to(dtype), -1)
    return Regions(image, corners[:, [1, 0]], corners[:, [3, 2]])


def make_bins(
    regions: Regions,
    output_size: tuple[int, int],
    spatial_scale: float,
    size_hw: tuple[int, int],
    corners: Corners | None = None,
) -> Tensor:
    """Whole pixels of every bin, clipped to the map.

    Args:
        regions: R of them.
        output_size: Bins (kh, kw).
        spatial_scale: Pixels of the map per pixel of the boxes.
        size_hw: Height and width of the map.
        corners: How `ps_roi_pool` reads corners; None: rounded, the end inclusive (Fast R-CNN).

    Returns:
        int32 [R, 1 + 2*kh + 2*kw]: image (or -1 for a bad box), kh row begins, kh row ends, kw
        column begins, kw column ends. A bin is empty where end <= begin.
    """
    if corners == "rfcn":
        extent = _rfcn_extent(regions, spatial_scale)
    elif corners == "torchvision":
        extent = _rounded_extent(regions, spatial_scale, end=0)
    else:
        extent = _rounded_extent(regions, spatial_scale, end=1)
    columns = [regions.image.to(torch.int32)[:, None]]
    for axis, (bins, size) in enumerate(zip(output_size, size_hw, strict=True)):
        start, bin_size, order = _bins_along(extent, axis, bins)
        if corners == "rfcn":  # floor(i*bin + start) and floor(i*bin) + start round differently
            begin = torch.floor(_add_product(start, order, bin_size))
            end = torch.ceil(_add_product(start, order + 1, bin_size))
        else:
            begin = torch.floor(order * bin_size) + start
            end = torch.ceil((order + 1) * bin_size) + start
        columns += [_to_pixel(begin, size), _to_pixel(end, size)]
    return torch.cat(columns, 1)


def make_samples(
    mode: Mode,
    regions: Regions,
    output_size: tuple[int, int],
    spatial_scale: float,
    size_hw: tuple[int, int],
    sampling_ratio: int,
) -> tuple[Tensor, Tensor]:
    """Where every bin samples before it is displaced, and the size that offsets are relative to.

    Sample i of a bin is at first + i*step along an axis.

    Args:
        mode: As in `deform_roi_pool`.
        regions: R of them.
        output_size: Bins (kh, kw).
        spatial_scale: Pixels of the map per pixel of the boxes.
        size_hw: Height and width of the map.
        sampling_ratio: Samples of a bin along an axis; 0: as the mode has it.

    Returns:
        [R, 1 + 3*kh + 3*kw]: image (or -1 for a bad box), then for the rows kh firsts, kh steps,
        kh counts, then the same for the columns; and the size [R, 2], (height, width) in pixels.
    """
    if mode == "paper":
        pixels = make_bins(regions, output_size, spatial_scale, size_hw)
        size = _rounded_extent(regions, spatial_scale, end=1).size
        return _samples_of_bins(pixels, output_size, regions.image), size
    if mode == "mmcv":
        start = _scaled(regions.low, spatial_scale) - 0.5
        extent = Extent(start, _scaled(regions.high, spatial_scale) - 0.5 - start)
    else:
        extent = _rfcn_extent(regions, spatial_scale)
        extent = Extent(extent.start - 0.5, extent.size)
    columns = [regions.image[:, None]]
    for axis, bins in enumerate(output_size):
        start, bin_size, order = _bins_along(extent, axis, bins)
        if mode == "mxnet":
            count = torch.full_like(bin_size, sampling_ratio or _MXNET_SAMPLES)
        elif sampling_ratio:
            count = torch.full_like(bin_size, sampling_ratio)
        else:
            count = torch.ceil(bin_size).clamp(min=0)
        step = _divide(bin_size, count.clamp(min=1))
        first = start + order * bin_size
        if mode == "mmcv":  # the middle of each part; mxnet samples at its beginning
            first = first + 0.5 * step
        columns += [first, step.expand_as(first), count.expand_as(first)]
    return torch.cat(columns, 1), extent.size


def make_shift(offset: Tensor, size: Tensor, gamma: float) -> Tensor:
    """Normalized offsets to pixels, differentiable.

    Args:
        offset: [R, 2*classes, ph, pw], (x, y) interleaved.
        size: [R, 2], (height, width) of the regions in pixels.
        gamma: Factor of all offsets.

    Returns:
        [R, 2*classes, ph, pw] in pixels, (x, y) interleaved, in the dtype of `size`.
    """
    factor = gamma * size.flip(1)  # (width, height), the order of the channels
    factor = factor.repeat(1, offset.shape[1] // 2)
    return offset.to(size.dtype) * factor[:, :, None, None]


def _samples_of_bins(bins: Tensor, output_size: tuple[int, int], image: Tensor) -> Tensor:
    """Every pixel of a bin is a sample."""
    kh, kw = output_size
    _, *edges = bins.to(image.dtype).split([1, kh, kh, kw, kw], 1)
    columns = [image[:, None]]
    for begin, end in (edges[:2], edges[2:]):
        columns += [begin, torch.ones_like(begin), (end - begin).clamp(min=0)]
    return torch.cat(columns, 1)


def _rounded_extent(regions: Regions, spatial_scale: float, end: int) -> Extent:
    """Fast R-CNN: corners rounded to pixels; `end`=1 takes the last one in."""
    start = _round(_scaled(regions.low, spatial_scale))
    size = _round(_scaled(regions.high, spatial_scale)) - start + end
    return Extent(start, size.clamp(min=1))


def _rfcn_extent(regions: Regions, spatial_scale: float) -> Extent:
    """R-FCN: corners rounded before they are scaled, the last pixel taken in."""
    start = _scaled(_round(regions.low), spatial_scale)
    size = _scaled(_round(regions.high) + 1, spatial_scale) - start
    return Extent(start, size.clamp(min=0.1))


def _bins_along(extent: Extent, axis: int, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Start [R, 1] and size [R, 1] of the bins along an axis, and their numbers [k]."""
    order = torch.arange(bins, device=extent.start.device, dtype=extent.start.dtype)
    size = extent.size[:, axis, None]
    return extent.start[:, axis, None], _divide(size, size.new_full((), bins)), order


def _divide(value: Tensor, number: Tensor) -> Tensor:
    """Quotient, in float32 with the same bits everywhere.

    Compilers, and torch on a GPU where the number is none of its tensors, multiply by the
    reciprocal instead, which in float32 gives other bins. Of a quotient in float64 both give the
    same number when it is rounded.
    """
    return (_wide(value) / _wide(number)).to(value.dtype)


def _add_product(start: Tensor, factor: Tensor, size: Tensor) -> Tensor:
    """Sum of `start` and factor*size, in float32 rounded twice everywhere; compilers fuse the two.

    float64 holds the product of two float32 exactly, and a sum of two rounded to float64, then to
    float32, is the sum rounded once.
    """
    product = (_wide(factor) * _wide(size)).to(start.dtype)
    return (_wide(start) + _wide(product)).to(start.dtype)


def _wide(value: Tensor) -> Tensor:
    return value if value.device.type == "mps" else value.double()  # Apple's GPUs have no float64


def _scaled(corners: Tensor, spatial_scale: float) -> Tensor:
    return _limit(corners * spatial_scale)


def _limit(corners: Tensor) -> Tensor:
    return corners.clamp(-_FAR, _FAR)


def _round(value: Tensor) -> Tensor:
    """Half away from zero; floor(|v| + 0.5) would round the number below 0.5 up."""
    whole = value.trunc()
    return whole + (2 * (value - whole)).trunc()


def _to_pixel(edge: Tensor, size: int) -> Tensor:
    """Clip to the map as floating point, as the edge may fit no integer, then again as integer.

    float32 rounds sizes above 2^24.
    """
    return edge.clamp(0, size).long().clamp(max=size).to(torch.int32)
