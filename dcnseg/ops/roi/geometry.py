"""Geometry of regions of interest (RoIs): boxes to bins, samples and shifts.

The native and the PyTorch implementation both pool what this file computes, so that they read the
same pixels on every device. Entry points: `locate_regions`, then `make_bins` or `make_samples`, and
`make_shift`. All computations are torch operations on small [R, ...] tensors in `position_dtype`.

R regions; k is kh or kw. A pair of axes is (y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcnseg.ops.roi.checks import Corners, Mode

# Coordinates are clamped to this magnitude, so that sums and products do not overflow float32.
_MAX_COORDINATE = 2.0**100

_MXNET_SAMPLES = 4  # default number of samples along an axis of a bin


class Regions(NamedTuple):
    """Boxes in pixels of the image; the corners of an invalid box are 0."""

    image: Tensor  # [R], batch index, or -1 for an invalid box
    low: Tensor  # [R, 2], (y1, x1)
    high: Tensor  # [R, 2], (y2, x2)


class Extent(NamedTuple):
    """Start and size of regions in pixels of the map."""

    start: Tensor  # [R, 2]
    size: Tensor  # [R, 2]


def position_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype of positions, which is at least float32."""
    return torch.promote_types(input.dtype, torch.float32)


def locate_regions(boxes: Tensor | Sequence[Tensor], input: Tensor) -> Regions:
    """Split checked boxes into image and corners, without gradient, as in torchvision and mmcv.

    A box is invalid if a coordinate is not finite or its batch index is out of range; the latter is
    not checked before under torch.compile and CUDA graph capture.
    """
    dtype = position_dtype(input)
    if isinstance(boxes, Tensor):
        index, corners = boxes.detach()[:, 0], boxes.detach()[:, 1:]
        is_valid = (index >= 0) & (index < input.shape[0]) & (index == index.floor())
    else:
        corners = torch.cat([each.detach() for each in boxes]) if boxes else input.new_empty(0, 4)
        each_index = [
            corners.new_full((each.shape[0],), i, dtype=dtype) for i, each in enumerate(boxes)
        ]
        index = torch.cat(each_index) if boxes else corners.new_empty(0, dtype=dtype)
        is_valid = index >= 0
    is_valid = is_valid & corners.isfinite().all(1)
    corners = _clamp_coordinates(torch.where(is_valid[:, None], corners.to(dtype), 0))
    image = torch.where(is_valid, index.to(dtype), -1)
    return Regions(image, corners[:, [1, 0]], corners[:, [3, 2]])


def make_bins(
    regions: Regions,
    output_size: tuple[int, int],
    spatial_scale: float,
    size_hw: tuple[int, int],
    corners: Corners | None = None,
) -> Tensor:
    """Compute the pixel ranges of every bin, clipped to the map.

    Args:
        regions: R regions.
        output_size: Number of bins (kh, kw).
        spatial_scale: Pixels of the map per pixel of the boxes.
        size_hw: Height and width of the map.
        corners: As in `ps_roi_pool`. None: rounded, with an inclusive end (Fast R-CNN).

    Returns:
        int32 [R, 1 + 2*kh + 2*kw]: image (-1 for an invalid box), kh row begins, kh row ends, kw
        column begins, kw column ends. Ends are exclusive; a bin is empty if end <= begin.
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
    """Compute the samples of every bin without offsets, and the sizes that scale the offsets.

    Sample i of a bin has the position first + i*step along an axis.

    Args:
        mode: As in `deform_roi_pool`.
        regions: R regions.
        output_size: Number of bins (kh, kw).
        spatial_scale: Pixels of the map per pixel of the boxes.
        size_hw: Height and width of the map.
        sampling_ratio: Number of samples of a bin along an axis; 0: as the mode defines.

    Returns:
        samples: [R, 1 + 3*kh + 3*kw]: image (-1 for an invalid box), then kh firsts, kh steps and
            kh counts of the rows, then the same for the columns.
        size: [R, 2], (height, width) in pixels of the map.
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
        if mode == "mmcv":  # the center of each part; mxnet samples at its start
            first = first + 0.5 * step
        columns += [first, step.expand_as(first), count.expand_as(first)]
    return torch.cat(columns, 1), extent.size


def make_shift(offset: Tensor, size: Tensor, gamma: float) -> Tensor:
    """Convert normalized offsets to pixels; differentiable.

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
    """Return samples at every pixel of the bins."""
    kh, kw = output_size
    _, *edges = bins.to(image.dtype).split([1, kh, kh, kw, kw], 1)
    columns = [image[:, None]]
    for begin, end in (edges[:2], edges[2:]):
        columns += [begin, torch.ones_like(begin), (end - begin).clamp(min=0)]
    return torch.cat(columns, 1)


def _rounded_extent(regions: Regions, spatial_scale: float, end: int) -> Extent:
    """Extent with corners rounded to pixels (Fast R-CNN); `end`=1 includes the last pixel."""
    start = _round(_scaled(regions.low, spatial_scale))
    size = _round(_scaled(regions.high, spatial_scale)) - start + end
    return Extent(start, size.clamp(min=1))


def _rfcn_extent(regions: Regions, spatial_scale: float) -> Extent:
    """Extent with corners rounded before scaling, including the last pixel (R-FCN)."""
    start = _scaled(_round(regions.low), spatial_scale)
    size = _scaled(_round(regions.high) + 1, spatial_scale) - start
    return Extent(start, size.clamp(min=0.1))


def _bins_along(extent: Extent, axis: int, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return start [R, 1] and size [R, 1] of the bins along an axis, and their indices [k]."""
    order = torch.arange(bins, device=extent.start.device, dtype=extent.start.dtype)
    size = extent.size[:, axis, None]
    return extent.start[:, axis, None], _divide(size, size.new_full((), bins)), order


def _divide(value: Tensor, divisor: Tensor) -> Tensor:
    """Return the quotient, in float32 with the same bits on every device.

    Compilers, and torch on a GPU for a divisor that is not on it, multiply by the reciprocal
    instead, which gives different bins in float32. In float64 both round to the same float32.
    """
    return (_to_float64(value) / _to_float64(divisor)).to(value.dtype)


def _add_product(start: Tensor, factor: Tensor, size: Tensor) -> Tensor:
    """Return start + factor*size with two roundings in float32, which compilers might fuse.

    The product of two float32 is exact in float64, and rounding a sum of two float32 to float64
    first does not change its float32 value.
    """
    product = (_to_float64(factor) * _to_float64(size)).to(start.dtype)
    return (_to_float64(start) + _to_float64(product)).to(start.dtype)


def _to_float64(value: Tensor) -> Tensor:
    return value if value.device.type == "mps" else value.double()  # MPS does not support float64


def _scaled(corners: Tensor, spatial_scale: float) -> Tensor:
    return _clamp_coordinates(corners * spatial_scale)


def _clamp_coordinates(corners: Tensor) -> Tensor:
    return corners.clamp(-_MAX_COORDINATE, _MAX_COORDINATE)


def _round(value: Tensor) -> Tensor:
    """Round half away from zero; floor(|v| + 0.5) would round up the largest float below 0.5."""
    truncated = value.trunc()
    return truncated + (2 * (value - truncated)).trunc()


def _to_pixel(edge: Tensor, size: int) -> Tensor:
    """Clamp to the map, before the conversion, which could overflow, and after it.

    Sizes above 2^24 are not exact in float32.
    """
    return edge.clamp(0, size).long().clamp(max=size).to(torch.int32)
