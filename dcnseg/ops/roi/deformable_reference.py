"""Reference implementation of deformable RoI pooling in PyTorch, also used as the fallback.

Bilinear samples of the bins that `dcnseg.ops.roi.geometry` computes. For torch.compile and CUDA
graphs see `dcnseg.ops.roi.reference`; shape letters are those of `dcnseg.ops.roi.gather`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dcnseg.ops.roi.checks import Mode
from dcnseg.ops.roi.gather import (
    Groups,
    gather,
    in_chunks,
    pixel_table,
    set_invalid_to_nan,
    to_output_format,
)

_MAX_SAMPLES = 2**53  # of a bin along an axis; as in cuda_ops/include/roi_samples.h


def deform_roi_pool_reference(
    input: Tensor,
    samples: Tensor,
    shift: Tensor | None,
    output_size: tuple[int, int],
    group_size: tuple[int, int],
    mode: Mode,
) -> Tensor:
    """Mean of displaced bilinear samples; see `dcnseg.ops.roi.deformable_pooling`.

    Args:
        input: [B, C_out*gh*gw, H, W].
        samples: [R, 1 + 3*kh + 3*kw] of `make_samples`.
        shift: Displacements in pixels, (x, y) interleaved, [R, 2*S, ph, pw].
        output_size: Number of bins (kh, kw).
        group_size: As in `roi_avg_pool_reference`.
        mode: Determines the border of the map and the divisor of the sums.

    Returns:
        [R, C_out, kh, kw] in the dtype and memory format of `input`.
    """
    classes = 1 if shift is None else shift.shape[1] // 2
    groups = Groups(input, classes, output_size, group_size)
    table = pixel_table(input, groups)
    lines = _lines(samples, shift, groups)
    is_moved = shift is not None

    def pool(table: Tensor, image: Tensor, *parts: Tensor) -> Tensor:
        line_y, line_x = _Line(*parts[:6]), _Line(*parts[6:])
        y = _locate(line_y, groups.height, mode, is_moved)
        x = _locate(line_x, groups.width, mode, is_moved)
        output = _blend(table, image, y, x, groups) / _divisor(line_y, line_x, y, x, mode)
        return output + _nan_for_nonfinite_shift(line_y, line_x)[..., None]

    counts = [line.end - line.begin for line in lines]
    output = in_chunks(pool, table, (samples[:, 0], *lines[0], *lines[1]), counts, groups)
    return to_output_format(set_invalid_to_nan(output, samples[:, 0]), input)


class _Line(NamedTuple):
    """Samples of every bin along one axis; shapes broadcast to [R, S, kh, kw]."""

    first: Tensor
    step: Tensor
    samples: Tensor  # number of samples
    shift: Tensor
    begin: Tensor  # index of the first sample that may be on the map
    end: Tensor  # exclusive


class _Axis(NamedTuple):
    """Rows or columns next to each sample and their weights, each [r, S, kh, kw, n]."""

    corners: tuple[Tensor, Tensor]  # indices of rows or columns, -1 outside the map
    weights: tuple[Tensor, Tensor]
    is_valid: Tensor


def _lines(samples: Tensor, shift: Tensor | None, groups: Groups) -> tuple[_Line, _Line]:
    kh, kw = groups.output_size
    parts = samples[:, None].split([1, kh, kh, kh, kw, kw, kw], 2)[1:]
    rows = [part[:, :, :, None] for part in parts[:3]]  # [R, 1, kh, 1]
    columns = [part[:, :, None, :] for part in parts[3:]]
    shift_y, shift_x = _shift_of_bins(samples, shift, groups.output_size)
    return _line(rows, shift_y, groups.height), _line(columns, shift_x, groups.width)


def _line(parts: list[Tensor], shift: Tensor, size: int) -> _Line:
    first, step, count = parts
    begin, end = _samples_near(first, step, count, shift.detach(), size)
    return _Line(first, step, count, shift, begin, end)


def _shift_of_bins(
    samples: Tensor, shift: Tensor | None, output_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the shifts of every bin along y and x, [R, S, kh, kw], given those of the parts."""
    kh, kw = output_size
    if shift is None:
        zero = samples.new_zeros(samples.shape[0], 1, kh, kw)
        return zero, zero
    is_invalid = samples[:, 0] < 0
    # A factor of NaN also makes the gradient NaN.
    shift = shift * torch.where(is_invalid, math.nan, 1.0)[:, None, None, None]
    ph, pw = shift.shape[2:]
    row = torch.arange(kh, device=shift.device) * ph // kh
    column = torch.arange(kw, device=shift.device) * pw // kw
    bins = shift.index_select(2, row).index_select(3, column)
    return bins[:, 1::2], bins[:, 0::2]


def _samples_near(
    first: Tensor, step: Tensor, count: Tensor, shift: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Index range [begin, end) that contains all samples within [-1, size] along an axis.

    As `samples_near` in cuda_ops/include/roi_samples.h. Needed because a box may be 1e30 pixels
    wide and have as many samples. Allows for rounding errors of one pixel and two samples.
    """
    count = _to_count(count)
    slack = 1 + ((first.abs() + shift.abs() + size) / 2**20).clamp(max=1)
    low, high = -slack - first - shift, size + slack - first - shift
    to_first = torch.where(step > 0, low, high) / step
    to_last = torch.where(step > 0, high, low) / step
    begin, end = _to_count(to_first - 2), _to_count(to_last + 3)
    # With a step of 0 all samples have the same position.
    begin = torch.where(step == 0, 0, begin)
    end = torch.where(step == 0, torch.where((low <= 0) & (high >= 0), count, 0), end)
    end = torch.minimum(end, count)
    begin = torch.minimum(begin, end)
    return begin, end


def _to_count(value: Tensor) -> Tensor:
    """Convert to an integer in 0..2^53; NaN becomes 0."""
    return value.nan_to_num(nan=0.0).clamp(0, _MAX_SAMPLES).long()


def _locate(line: _Line, size: int, mode: Mode, is_moved: bool) -> _Axis:
    """Locate the samples along one axis; those that are not valid read no pixel.

    In mode "paper", samples without a shift coincide with pixels. Their neighbors, which may be
    NaN, are then not read.
    """
    max_count = int((line.end - line.begin).max()) if line.begin.numel() else 0
    sample = line.begin[..., None] + torch.arange(max_count, device=line.begin.device)
    position = line.first[..., None] + sample.to(line.first.dtype) * line.step[..., None]
    position = position + line.shift[..., None]
    low, high = {"paper": (-1, size), "mmcv": (-1, size), "mxnet": (-0.5, size - 0.5)}[mode]
    is_valid = (position >= low) & (position <= high) & (sample < line.end[..., None])
    position = torch.where(is_valid, position, 0)
    if mode != "paper":  # the border is replicated; the derivative outside is 0
        is_before = position.detach() < 0
        edge = position.detach().clamp(0, size - 1)  # the gradient of clamp is 0 at its limits, too
        position = torch.where(position == edge, position, edge)
    corner = torch.floor(position.detach())
    fraction = position - corner  # the right-hand derivative at integer positions
    if mode == "paper":
        corners = (corner, corner + 1 if is_moved else torch.full_like(corner, -1))
    else:
        # Before the first pixel, both corners are that pixel: the second one may be NaN.
        corners = (corner, torch.where(is_before, corner, (corner + 1).clamp(max=size - 1)))
    is_inside = [is_valid & (each >= 0) & (each < size) for each in corners]
    indices = [
        torch.where(is_in, each, -1).long() for is_in, each in zip(is_inside, corners, strict=True)
    ]
    weights = [
        torch.where(is_in, weight, 0)
        for is_in, weight in zip(is_inside, (1 - fraction, fraction), strict=True)
    ]
    return _Axis((indices[0], indices[1]), (weights[0], weights[1]), is_valid)


def _blend(table: Tensor, image: Tensor, y: _Axis, x: _Axis, groups: Groups) -> Tensor:
    """Return the sum of the bilinear samples of every bin, [r, S, kh, kw, Cs]."""
    parts = []
    for row, along_y in zip(y.corners, y.weights, strict=True):
        for column, along_x in zip(x.corners, x.weights, strict=True):
            rows, columns = row[..., :, None], column[..., None, :]
            index = torch.where((rows >= 0) & (columns >= 0), rows * groups.width + columns, -1)
            weight = along_y[..., :, None] * along_x[..., None, :]  # [r, S, kh, kw, ny, nx]
            values = gather(table, index, image, groups)
            parts.append((values * weight[..., None]).sum((4, 5)))
    return parts[0] + parts[1] + parts[2] + parts[3]


def _divisor(line_y: _Line, line_x: _Line, y: _Axis, x: _Axis, mode: Mode) -> Tensor:
    """Return the divisor of the sums, at least 1: [r, 1 or S, kh, kw, 1]."""
    count_y, count_x = line_y.samples, line_x.samples
    if mode == "mxnet":
        count_y = y.is_valid.sum(-1).to(count_y.dtype)
        count_x = x.is_valid.sum(-1).to(count_x.dtype)
    return (count_y * count_x).clamp(min=1)[..., None]


def _nan_for_nonfinite_shift(y: _Line, x: _Line) -> Tensor:
    """Return NaN with NaN gradients where a bin with samples has a nonfinite shift, else 0."""
    has_samples = (y.samples >= 1) & (x.samples >= 1)
    shift_y, shift_x = (torch.where(has_samples, line.shift, 0) for line in (y, x))
    zero = 0 * shift_y.detach() + 0 * shift_x.detach()
    return zero * shift_y + zero * shift_x
