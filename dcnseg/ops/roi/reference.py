"""Reference implementation of max and average RoI pooling in PyTorch, also used as the fallback.

Pools the bins that `dcnseg.ops.roi.geometry` computes. The size of the largest bin is read from the
tensors, which breaks the graph of torch.compile and prevents the capture of CUDA graphs.

Shape letters are those of `dcnseg.ops.roi.gather`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcnseg.ops.roi.gather import (
    Groups,
    gather,
    in_chunks,
    pixel_table,
    set_invalid_to_nan,
    to_output_format,
)
from dcnseg.ops.roi.geometry import position_dtype


def roi_pool_reference(input: Tensor, bins: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Maximum of every bin; see `dcnseg.ops.roi.pooling`.

    Args:
        input: [B, C, H, W].
        bins: [R, 1 + 2*kh + 2*kw] of `make_bins`.
        output_size: Number of bins (kh, kw).

    Returns:
        [R, C, kh, kw] in the dtype and memory format of `input`.
    """
    channels, pixels = input.shape[1], input.shape[2] * input.shape[3]
    pixel = _first_maxima(input.detach(), bins, output_size)
    image = bins[:, 0].long().clamp(min=0)
    plane = image[:, None] * channels + torch.arange(channels, device=input.device)
    index = plane[:, :, None, None] * pixels + pixel.clamp(min=0)
    # Gradients are summed in at least float32.
    values = input.to(position_dtype(input)).reshape(-1)
    values = values.index_select(0, index.flatten()).view(index.shape)
    values = set_invalid_to_nan(torch.where(pixel >= 0, values, 0), bins[:, 0])
    return to_output_format(values, input)


def roi_avg_pool_reference(
    input: Tensor, bins: Tensor, output_size: tuple[int, int], group_size: tuple[int, int] = (1, 1)
) -> Tensor:
    """Mean of every bin; see `dcnseg.ops.roi_avg_pool` and `dcnseg.ops.ps_roi_pool`.

    Args:
        input: [B, C_out*gh*gw, H, W].
        bins: [R, 1 + 2*kh + 2*kw] of `make_bins`.
        output_size: Number of bins (kh, kw).
        group_size: (gh, gw); bin (i, j) of channel c reads channel
            (c*gh + i*gh//kh)*gw + j*gw//kw.

    Returns:
        [R, C_out, kh, kw] in the dtype and memory format of `input`.
    """
    groups = Groups(input, 1, output_size, group_size)

    def pool(table: Tensor, image: Tensor, *edges: Tensor) -> Tensor:
        index = _window_index(edges, groups.width)
        sums = gather(table, index, image, groups).sum((4, 5))  # [r, 1, kh, kw, C_out]
        size_y, size_x = ((edges[i + 1] - edges[i]).clamp(min=0) for i in (0, 2))
        size = (size_y[:, :, None] * size_x[:, None, :]).clamp(min=1)
        return sums / size[:, None, :, :, None]

    output = _pool_in_chunks(pool, input, bins, groups)
    return to_output_format(set_invalid_to_nan(output, bins[:, 0]), input)


def _pool_in_chunks(
    pool: Callable[..., Tensor], input: Tensor, bins: Tensor, groups: Groups
) -> Tensor:
    """`in_chunks` with row begins, row ends [R, kh], column begins and column ends [R, kw]."""
    kh, kw = groups.output_size
    _, *edges = bins.long().split([1, kh, kh, kw, kw], 1)
    counts = [(edges[i + 1] - edges[i]).clamp(min=0) for i in (0, 2)]
    return in_chunks(pool, pixel_table(input, groups), (bins[:, 0], *edges), counts, groups)


def _pixels_of(begin: Tensor, end: Tensor) -> Tensor:
    """Rows or columns of each bin, [r, k, n]; -1 after its end."""
    max_size = int((end - begin).clamp(min=0).max()) if begin.numel() else 0
    pixel = begin[..., None] + torch.arange(max_size, device=begin.device)
    return torch.where(pixel < end[..., None], pixel, -1)


def _window_index(edges: Sequence[Tensor], width: int) -> Tensor:
    """Pixel indices of all bins, [r, 1, kh, kw, ny, nx]; -1 where there is no pixel."""
    row = _pixels_of(edges[0], edges[1])[:, None, :, None, :, None]
    column = _pixels_of(edges[2], edges[3])[:, None, None, :, None, :]
    return torch.where((row >= 0) & (column >= 0), row * width + column, -1)


@torch.no_grad()
def _first_maxima(input: Tensor, bins: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Index of the pixel that is the first maximum of its bin, or -1: [R, C, kh, kw]."""
    groups = Groups(input, 1, output_size, (1, 1))

    def find(table: Tensor, image: Tensor, *edges: Tensor) -> Tensor:
        index = _window_index(edges, groups.width)
        if not index.shape[4] * index.shape[5]:  # all bins of the chunk are empty
            return index.new_full((*index.shape[:4], groups.channels), -1)
        values = gather(table, index, image, groups).flatten(4, 5)  # [r, 1, kh, kw, n, C]
        index = index.flatten(4, 5)
        values = torch.where(index[..., None] >= 0, values, -math.inf)
        maximum = values.amax(4, keepdim=True)  # NaN if any value is NaN
        # Which of several maxima torch.max returns depends on the device, so the smallest index is
        # selected. If all values are -inf, that is 0, a pixel of the bin unless it is empty.
        last = index.shape[4] - 1
        order = torch.arange(last + 1, device=index.device, dtype=torch.int32)[:, None]
        first = torch.where((values == maximum) | values.isnan(), order, last).amin(4)
        return index.gather(4, first.long())

    return _pool_in_chunks(find, input, bins, groups)
