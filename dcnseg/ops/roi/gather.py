"""Gathering of the pixels of many bins in PyTorch, in chunks of regions of interest (RoIs).

Entry points: `Groups` and `pixel_table`, then `in_chunks` with a function that calls `gather`.

Shape letters: B batch, C channels, H height, W width; R regions, r regions of a chunk; S classes of
offsets, Cs = C_out/S; ny, nx maximum number of samples of a bin of the chunk along each axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dcnseg.ops.checks import check_memory
from dcnseg.ops.layout import is_channels_last, memory_format
from dcnseg.ops.roi.geometry import position_dtype

# Maximum number of gathered values of a chunk of RoIs: 64 MiB in float32.
_CHUNK_ELEMENTS = 1 << 24


class Groups:
    """Sizes of a call, and the input channels that the bins of each output channel read."""

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
        """Return the first table row of each image, group and class, [r, S, kh, kw, 1, 1]."""
        (gh, gw), (kh, kw), device = self.group_size, self.output_size, image.device
        row_group = torch.arange(kh, device=device) * gh // kh
        column_group = torch.arange(kw, device=device) * gw // kw
        group = row_group[:, None] * gw + column_group
        group = image.long().clamp(min=0)[:, None, None] * (gh * gw) + group  # [r, kh, kw]
        each_class = torch.arange(self.classes, device=device)[:, None, None]
        first = (group[:, None] * self.classes + each_class) * (self.height * self.width)
        return first[..., None, None]


def pixel_table(input: Tensor, groups: Groups) -> Tensor:
    """Return the pixels as rows of Cs channels, [B*gh*gw*S*H*W + 1, Cs], in at least float32.

    The last row is zero and replaces pixels that must not be read, because they may be NaN.
    """
    (gh, gw), pixels = groups.group_size, groups.height * groups.width
    planes = input.to(position_dtype(input)).reshape(
        input.shape[0], groups.classes, groups.channels, gh * gw, pixels
    )
    planes = planes.permute(0, 3, 1, 4, 2)  # [B, gh*gw, S, H*W, Cs]
    table = planes.reshape(math.prod(planes.shape[:4]), groups.channels)
    return torch.cat([table, table.new_zeros(1, groups.channels)])


def gather(table: Tensor, index: Tensor, image: Tensor, groups: Groups) -> Tensor:
    """Return the table rows of pixels [r, 1 or S, kh, kw, ny, nx]; -1 selects the row of zeros."""
    rows = torch.where(index >= 0, groups.first_rows(image) + index, table.shape[0] - 1)
    return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])


def in_chunks(
    pool: Callable[..., Tensor],
    table: Tensor,
    parts: tuple[Tensor, ...],
    counts: list[Tensor],
    groups: Groups,
) -> Tensor:
    """Pool chunk by chunk to [R, C_out, kh, kw]. The backward gathers the pixels again."""
    regions, (kh, kw) = parts[0].shape[0], groups.output_size
    bins = kh * kw * groups.classes
    _check_samples(counts[0], counts[1], bins, table)
    chunks = []
    for begin, end in _chunks(counts[0], counts[1], bins * groups.channels):
        arguments = (table, *(part[begin:end] for part in parts))
        if torch.is_grad_enabled() and end - begin < regions:
            chunk = checkpoint(pool, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = pool(*arguments)
        chunks.append(chunk)
    output = torch.cat(chunks)  # [R, S, kh, kw, Cs]
    return output.permute(0, 1, 4, 2, 3).reshape(regions, groups.classes * groups.channels, kh, kw)


def _chunks(counts_y: Tensor, counts_x: Tensor, sample_elements: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of regions within `_CHUNK_ELEMENTS`; one empty range if there are no regions."""
    begin, max_y, max_x = 0, 0, 0
    for i, (ny, nx) in enumerate(_max_samples(counts_y, counts_x)):
        max_y, max_x = max(max_y, ny), max(max_x, nx)
        if i > begin and (i + 1 - begin) * max_y * max_x * sample_elements > _CHUNK_ELEMENTS:
            yield begin, i
            begin, max_y, max_x = i, ny, nx
    yield begin, counts_y.shape[0]


def _max_samples(counts_y: Tensor, counts_x: Tensor) -> list[tuple[int, int]]:
    """Return the maximum number of samples of a bin of each region along y and x."""
    y, x = (count.flatten(1).amax(1).tolist() for count in (counts_y, counts_x))
    return list(zip(y, x, strict=True))


def _check_samples(counts_y: Tensor, counts_x: Tensor, bins: int, table: Tensor) -> None:
    """Raise a ShapeError if the samples of one box do not fit in memory."""
    max_samples = max((y * x for y, x in _max_samples(counts_y, counts_x)), default=0)
    values = 2 * table.shape[1] * table.element_size()  # per sample, gathered and weighted
    needed = max_samples * bins * (values + 2 * torch.int64.itemsize)
    check_memory(
        needed, table.device, "The PyTorch implementation with {} samples per bin", max_samples
    )


def set_invalid_to_nan(output: Tensor, image: Tensor) -> Tensor:
    """Return `output` with NaN for invalid regions, whose image is -1."""
    return torch.where((image < 0)[:, None, None, None], math.nan, output)


def to_output_format(output: Tensor, input: Tensor) -> Tensor:
    """Convert to the dtype and memory format of `input`."""
    return output.to(input.dtype).contiguous(memory_format=memory_format(is_channels_last(input)))
