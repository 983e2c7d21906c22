"""The RoI operators in plain PyTorch: their definition, the fallback, an oracle of the tests.

They pool what `dcnseg.ops.roi_geometry` lays out, gathering the pixels of every bin, a few RoIs at
a time. How many samples the largest bin has is read from the tensors: torch.compile breaks its
graph there, and a CUDA graph cannot be captured.

Shape letters as everywhere, and: R regions, r of a chunk; S classes of offsets; Cs = C_out/S;
ny, nx the most samples that a bin of the chunk has along each axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dcnseg.ops.roi_checks import Mode
from dcnseg.ops.roi_geometry import position_dtype

# Gathered values that one chunk of RoIs may hold: 64 MB in float32.
_CHUNK_ELEMENTS = 1 << 24

_MOST_SAMPLES = 2**53  # of a bin along an axis; as in cuda_ops/include/roi_samples.h


def roi_pool_reference(input: Tensor, bins: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Largest value of every bin; see `dcnseg.ops.roi_pool`.

    Args:
        input: [B, C, H, W].
        bins: [R, 1 + 2*kh + 2*kw] of `make_bins`.
        output_size: Bins (kh, kw).

    Returns:
        [R, C, kh, kw] in the dtype and memory format of `input`.
    """
    channels, pixels = input.shape[1], input.shape[2] * input.shape[3]
    pixel = _first_maxima(input.detach(), bins, output_size)
    image = bins[:, 0].long().clamp(min=0)
    plane = image[:, None] * channels + torch.arange(channels, device=input.device)
    index = plane[:, :, None, None] * pixels + pixel.clamp(min=0)
    # Gradients are summed in float32 at least.
    values = input.to(position_dtype(input)).reshape(-1)
    values = values.index_select(0, index.flatten()).view(index.shape)
    values = _nan_for_bad(torch.where(pixel >= 0, values, 0), bins[:, 0])
    return _as_input(values, input)


def roi_avg_pool_reference(
    input: Tensor, bins: Tensor, output_size: tuple[int, int], group_size: tuple[int, int] = (1, 1)
) -> Tensor:
    """Mean of every bin; see `dcnseg.ops.roi_avg_pool` and `dcnseg.ops.ps_roi_pool`.

    Args:
        input: [B, C_out*gh*gw, H, W].
        bins: [R, 1 + 2*kh + 2*kw] of `make_bins`.
        output_size: Bins (kh, kw).
        group_size: (gh, gw); bin (i, j) of channel c reads channel
            (c*gh + i*gh//kh)*gw + j*gw//kw.

    Returns:
        [R, C_out, kh, kw] in the dtype and memory format of `input`.
    """
    groups = _Groups(input, 1, output_size, group_size)
    table = _pixel_table(input, groups)
    rows, columns = _edges(bins, output_size)

    def pool(table: Tensor, image: Tensor, *edges: Tensor) -> Tensor:
        row, column = _pixels_of(edges[0], edges[1]), _pixels_of(edges[2], edges[3])
        index = _window_index(row, column, groups.width)[:, None]  # [r, 1, kh, kw, ny, nx]
        sums = _gather(table, index, image, groups).sum((4, 5))  # [r, 1, kh, kw, C_out]
        size_y, size_x = ((edges[i + 1] - edges[i]).clamp(min=0) for i in (0, 2))
        size = (size_y[:, :, None] * size_x[:, None, :]).clamp(min=1)
        return sums / size[:, None, :, :, None]

    counts = [(end - begin).clamp(min=0) for begin, end in (rows, columns)]
    output = _in_chunks(pool, table, (bins[:, 0], *rows, *columns), counts, groups)
    return _as_input(_nan_for_bad(output, bins[:, 0]), input)


def deform_roi_pool_reference(
    input: Tensor,
    samples: Tensor,
    shift: Tensor | None,
    output_size: tuple[int, int],
    group_size: tuple[int, int],
    mode: Mode,
) -> Tensor:
    """Mean of displaced bilinear samples; see `dcnseg.ops.deform_roi_pool`.

    Args:
        input: [B, C_out*gh*gw, H, W].
        samples: [R, 1 + 3*kh + 3*kw] of `make_samples`.
        shift: Displacements in pixels, (x, y) interleaved, [R, 2*S, ph, pw].
        output_size: Bins (kh, kw).
        group_size: As in `roi_avg_pool_reference`.
        mode: What lies at the edge of the map, and by what the sums are divided.

    Returns:
        [R, C_out, kh, kw] in the dtype and memory format of `input`.
    """
    classes = 1 if shift is None else shift.shape[1] // 2
    groups = _Groups(input, classes, output_size, group_size)
    table = _pixel_table(input, groups)
    lines = _lines(samples, shift, groups)
    is_moved = shift is not None

    def pool(table: Tensor, image: Tensor, *parts: Tensor) -> Tensor:
        line_y, line_x = _Line(*parts[:6]), _Line(*parts[6:])
        y = _locate(line_y, groups.height, mode, is_moved)
        x = _locate(line_x, groups.width, mode, is_moved)
        output = _blend(table, image, y, x, groups) / _divisor(line_y, line_x, y, x, mode)
        return output + _poison(line_y, line_x)[..., None]

    counts = [line.end - line.begin for line in lines]
    output = _in_chunks(pool, table, (samples[:, 0], *lines[0], *lines[1]), counts, groups)
    return _as_input(_nan_for_bad(output, samples[:, 0]), input)


class _Groups:
    """Which channels the bins of each output channel read: sizes of one call."""

    def __init__(
        self,
        input: Tensor,
        classes: int,
        output_size: tuple[int, int],
        group_size: tuple[int, int],
    ) -> None:
        self.height, self.width = input.shape[2:]
        self.classes = classes
        self.output_size = output_size
        self.group_size = group_size
        self.channels = input.shape[1] // math.prod(group_size) // classes  # Cs

    def first_rows(self, image: Tensor) -> Tensor:
        """Rows of the table where images, groups and classes begin: [r, S, kh, kw, 1, 1]."""
        (gh, gw), (kh, kw), device = self.group_size, self.output_size, image.device
        row_group = torch.arange(kh, device=device) * gh // kh
        column_group = torch.arange(kw, device=device) * gw // kw
        group = row_group[:, None] * gw + column_group
        group = image.long().clamp(min=0)[:, None, None] * (gh * gw) + group  # [r, kh, kw]
        each_class = torch.arange(self.classes, device=device)[:, None, None]
        first = (group[:, None] * self.classes + each_class) * (self.height * self.width)
        return first[..., None, None]


def _pixel_table(input: Tensor, groups: _Groups) -> Tensor:
    """Pixels as rows of Cs channels, [B*gh*gw*S*H*W + 1, Cs], float32 at least.

    The last row is zero: everything that is not to be read, be it NaN, reads that.
    """
    (gh, gw), pixels = groups.group_size, groups.height * groups.width
    planes = input.to(position_dtype(input)).reshape(
        input.shape[0], groups.classes, groups.channels, gh * gw, pixels
    )
    planes = planes.permute(0, 3, 1, 4, 2)  # [B, gh*gw, S, H*W, Cs]
    table = planes.reshape(math.prod(planes.shape[:4]), groups.channels)
    return torch.cat([table, table.new_zeros(1, groups.channels)])


def _gather(table: Tensor, index: Tensor, image: Tensor, groups: _Groups) -> Tensor:
    """Rows of the table for pixels [r, 1 or S, kh, kw, ny, nx], -1 for the row of zeros."""
    rows = torch.where(index >= 0, groups.first_rows(image) + index, table.shape[0] - 1)
    return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])


def _in_chunks(
    pool: Callable[..., Tensor],
    table: Tensor,
    parts: tuple[Tensor, ...],
    counts: list[Tensor],
    groups: _Groups,
) -> Tensor:
    """Pool a few regions at a time: [R, C_out, kh, kw]. The backward gathers them again."""
    regions, (kh, kw) = parts[0].shape[0], groups.output_size
    sample_elements = kh * kw * groups.classes * groups.channels
    chunks = []
    for begin, end in _chunks(counts[0], counts[1], sample_elements):
        arguments = (table, *(part[begin:end] for part in parts))
        if torch.is_grad_enabled() and end - begin < regions:
            chunk = checkpoint(pool, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = pool(*arguments)
        chunks.append(chunk)
    output = torch.cat(chunks)  # [R, S, kh, kw, Cs]
    return output.permute(0, 1, 4, 2, 3).reshape(regions, groups.classes * groups.channels, kh, kw)


def _chunks(counts_y: Tensor, counts_x: Tensor, sample_elements: int) -> Iterator[tuple[int, int]]:
    """Cut the regions so that no chunk gathers too much; at least one chunk, of no regions too."""
    counts = [count.flatten(1).amax(1).tolist() for count in (counts_y, counts_x)]
    begin, most_y, most_x = 0, 0, 0
    for i, (ny, nx) in enumerate(zip(*counts, strict=True)):
        most_y, most_x = max(most_y, ny), max(most_x, nx)
        if i > begin and (i + 1 - begin) * most_y * most_x * sample_elements > _CHUNK_ELEMENTS:
            yield begin, i
            begin, most_y, most_x = i, ny, nx
    yield begin, counts_y.shape[0]


def _edges(
    bins: Tensor, output_size: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(row begins, row ends) [R, kh] and (column begins, column ends) [R, kw]."""
    kh, kw = output_size
    _, *edges = bins.long().split([1, kh, kh, kw, kw], 1)
    return (edges[0], edges[1]), (edges[2], edges[3])


def _pixels_of(begin: Tensor, end: Tensor) -> Tensor:
    """Rows or columns of each bin, [r, k, n]; -1 behind its end."""
    most = int((end - begin).clamp(min=0).max()) if begin.numel() else 0
    pixel = begin[..., None] + torch.arange(most, device=begin.device)
    return torch.where(pixel < end[..., None], pixel, -1)


def _window_index(row: Tensor, column: Tensor, width: int) -> Tensor:
    """Pixel numbers of all bins, [r, kh, kw, ny, nx]; -1 where there is none."""
    row, column = row[:, :, None, :, None], column[:, None, :, None, :]
    return torch.where((row >= 0) & (column >= 0), row * width + column, -1)


@torch.no_grad()
def _first_maxima(input: Tensor, bins: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Number of the pixel that is the first maximum of its bin, or -1: [R, C, kh, kw]."""
    groups = _Groups(input, 1, output_size, (1, 1))
    table = _pixel_table(input, groups)
    rows, columns = _edges(bins, output_size)

    def find(table: Tensor, image: Tensor, *edges: Tensor) -> Tensor:
        row, column = _pixels_of(edges[0], edges[1]), _pixels_of(edges[2], edges[3])
        index = _window_index(row, column, groups.width)[:, None]
        if not index.shape[4] * index.shape[5]:  # all bins of the chunk are empty
            return index.new_full((*index.shape[:4], groups.channels), -1)
        values = _gather(table, index, image, groups).flatten(4, 5)  # [r, 1, kh, kw, n, C]
        index = index.flatten(4, 5)
        values = torch.where(index[..., None] >= 0, values, -math.inf)
        best = values.amax(4, keepdim=True)  # NaN if there is one
        # Which of several maxima torch.max names is up to the device, so: the smallest number. In a
        # bin of -inf alone that is number 0, a pixel of the bin unless it is empty.
        last = index.shape[4] - 1
        number = torch.arange(last + 1, device=index.device, dtype=torch.int32)[:, None]
        first = torch.where((values == best) | values.isnan(), number, last).amin(4)
        return index.gather(4, first.long())

    counts = [(end - begin).clamp(min=0) for begin, end in (rows, columns)]
    return _in_chunks(find, table, (bins[:, 0], *rows, *columns), counts, groups)


class _Line(NamedTuple):
    """The samples of every bin along one axis; shapes broadcast to [R, S, kh, kw]."""

    first: Tensor
    step: Tensor
    samples: Tensor  # how many
    shift: Tensor
    begin: Tensor  # number of the first sample that may read something
    end: Tensor


class _Axis(NamedTuple):
    """Between which rows or columns samples lie: each [r, S, kh, kw, n]."""

    corners: tuple[Tensor, Tensor]  # numbers of the rows or columns, -1 where outside
    weights: tuple[Tensor, Tensor]
    is_valid: Tensor


def _lines(samples: Tensor, shift: Tensor | None, groups: _Groups) -> tuple[_Line, _Line]:
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
    """The shifts of every bin along y and x, [R, S, kh, kw], from those of the parts."""
    kh, kw = output_size
    if shift is None:
        none = samples.new_zeros(samples.shape[0], 1, kh, kw)
        return none, none
    is_bad = samples[:, 0] < 0
    shift = shift * torch.where(is_bad, math.nan, 1.0)[:, None, None, None]  # and its gradient
    ph, pw = shift.shape[2:]
    row = torch.arange(kh, device=shift.device) * ph // kh
    column = torch.arange(kw, device=shift.device) * pw // kw
    bins = shift.index_select(2, row).index_select(3, column)
    return bins[:, 1::2], bins[:, 0::2]


def _samples_near(
    first: Tensor, step: Tensor, count: Tensor, shift: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Numbers [begin, end) that contain all samples within [-1, size] along an axis.

    As `samples_near` in cuda_ops/include/roi_samples.h: a box may be 1e30 pixels wide and have as
    many samples; rounding is taken to be a pixel and two samples at most.
    """
    count = _as_number(count)
    slack = 1 + ((first.abs() + shift.abs() + size) / 2**20).clamp(max=1)
    low, high = -slack - first - shift, size + slack - first - shift
    to_first = torch.where(step > 0, low, high) / step
    to_last = torch.where(step > 0, high, low) / step
    begin, end = _as_number(to_first - 2), _as_number(to_last + 3)
    # Without a step all samples lie on one point.
    begin = torch.where(step == 0, 0, begin)
    end = torch.where(step == 0, torch.where((low <= 0) & (high >= 0), count, 0), end)
    end = torch.minimum(end, count)
    begin = torch.minimum(begin, end)
    return begin, end


def _as_number(value: Tensor) -> Tensor:
    """To an integer in 0..2^53; NaN gives 0."""
    return value.nan_to_num(nan=0.0).clamp(0, _MOST_SAMPLES).long()


def _locate(line: _Line, size: int, mode: Mode, is_moved: bool) -> _Axis:
    """Samples along one axis; what is not valid reads nothing and has no weight.

    In the mode "paper" samples that nothing moves lie on pixels, whose neighbours, be they NaN, are
    not read.
    """
    most = int((line.end - line.begin).max()) if line.begin.numel() else 0
    number = line.begin[..., None] + torch.arange(most, device=line.begin.device)
    position = line.first[..., None] + number.to(line.first.dtype) * line.step[..., None]
    position = position + line.shift[..., None]
    low, high = {"paper": (-1, size), "mmcv": (-1, size), "mxnet": (-0.5, size - 0.5)}[mode]
    is_valid = (position >= low) & (position <= high) & (number < line.end[..., None])
    position = torch.where(is_valid, position, 0)
    if mode != "paper":  # the edge is replicated, and has no derivative beyond it
        edge = position.detach().clamp(0, size - 1)  # clamp's derivative is 0 at its limits, too
        position = torch.where(position == edge, position, edge)
    corner = torch.floor(position.detach())
    fraction = position - corner  # its derivative at whole positions is the right one
    if mode == "paper":
        corners = (corner, corner + 1 if is_moved else torch.full_like(corner, -1))
    else:
        corners = (corner, (corner + 1).clamp(max=size - 1))
    inside = [is_valid & (each >= 0) & (each < size) for each in corners]
    numbers = [
        torch.where(is_in, each, -1).long() for is_in, each in zip(inside, corners, strict=True)
    ]
    weights = [
        torch.where(is_in, weight, 0)
        for is_in, weight in zip(inside, (1 - fraction, fraction), strict=True)
    ]
    return _Axis((numbers[0], numbers[1]), (weights[0], weights[1]), is_valid)


def _blend(table: Tensor, image: Tensor, y: _Axis, x: _Axis, groups: _Groups) -> Tensor:
    """Sums of the bilinear samples of every bin: [r, S, kh, kw, Cs]."""
    parts = []
    for row, along_y in zip(y.corners, y.weights, strict=True):
        for column, along_x in zip(x.corners, x.weights, strict=True):
            rows, columns = row[..., :, None], column[..., None, :]
            index = torch.where((rows >= 0) & (columns >= 0), rows * groups.width + columns, -1)
            weight = along_y[..., :, None] * along_x[..., None, :]  # [r, S, kh, kw, ny, nx]
            values = _gather(table, index, image, groups)
            parts.append((values * weight[..., None]).sum((4, 5)))
    return parts[0] + parts[1] + parts[2] + parts[3]


def _divisor(line_y: _Line, line_x: _Line, y: _Axis, x: _Axis, mode: Mode) -> Tensor:
    """By what the sums of samples are divided, at least 1: [r, 1 or S, kh, kw, 1]."""
    count_y, count_x = line_y.samples, line_x.samples
    if mode == "mxnet":
        count_y = y.is_valid.sum(-1).to(count_y.dtype)
        count_x = x.is_valid.sum(-1).to(count_x.dtype)
    return (count_y * count_x).clamp(min=1)[..., None]


def _poison(y: _Line, x: _Line) -> Tensor:
    """0, or NaN where a bin's shift is not finite, and so are the gradients of both shifts.

    A bin without samples stays 0.
    """
    has_samples = (y.samples >= 1) & (x.samples >= 1)
    shift_y, shift_x = (torch.where(has_samples, line.shift, 0) for line in (y, x))
    zero = 0 * shift_y.detach() + 0 * shift_x.detach()
    return zero * shift_y + zero * shift_x


def _nan_for_bad(output: Tensor, image: Tensor) -> Tensor:
    return torch.where((image < 0)[:, None, None, None], math.nan, output)


def _as_input(output: Tensor, input: Tensor) -> Tensor:
    """In the dtype and the memory format of the input."""
    channels_last = not input.is_contiguous() and input.is_contiguous(
        memory_format=torch.channels_last
    )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return output.to(input.dtype).contiguous(memory_format=memory_format)
