"""Images of any size through a network that sees one window at a time, in bounded memory.

Windows overlap, and their probabilities are blended with weights that fall smoothly towards the
window's edge. A window's result is a `StripMap`, and only a strip of a few rows is computed and
blended at a time, so memory grows with what the network keeps of the windows of one or a few rows
of windows, not with the image's area. Entry point: `predict_strips`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dcnseg.inference.strips import StripMap

EDGE_WEIGHT = 1e-3  # above zero, so that a pixel seen only by a window's edge keeps its value


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Starts of evenly spread windows that cover 0..length.

    Args:
        length: Pixels to cover.
        window: Pixels of one window.
        overlap: Least share of a window that its neighbor covers too, in [0, 1).
    """
    if length <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    gaps = -(-(length - window) // step)
    return [(length - window) * i // gaps for i in range(gaps + 1)]


def blending_profile(length: int) -> Tensor:
    """Weights of a window's rows or columns, 1 in the middle and falling as sin^2 to the edges.

    The weight of a pixel is that of its row times that of its column.
    """
    phase = (torch.arange(length, dtype=torch.float32) + 0.5) * (torch.pi / length)
    return torch.sin(phase).square().clamp_min(EDGE_WEIGHT)


@dataclass(frozen=True)
class _WindowRow:
    """The windows that begin in one row of the image."""

    top: int
    maps: Sequence[StripMap]  # from left to right


def predict_strips(
    predict_window: Callable[[slice, slice], StripMap],
    size_hw: tuple[int, int],
    window_hw: tuple[int, int],
    overlap: float,
    *,
    max_rows: int,
) -> Iterator[tuple[int, Tensor]]:
    """Apply `predict_window` all over an image and blend.

    Args:
        predict_window: From the rows and columns of a window to the map of its values.
        size_hw: The image's size in pixels.
        window_hw: Size of a window; a smaller image is one smaller window.
        overlap: Least share of a window that its neighbor covers too, in [0, 1).
        max_rows: Most rows of a strip.

    Yields:
        First row of a strip and its blended values, [K, rows, W]; the strips follow each other from
        the top of the image to its bottom without gaps.
    """
    height, width = size_hw
    window_h, window_w = min(window_hw[0], height), min(window_hw[1], width)
    tops = window_starts(height, window_h, overlap)
    lefts = window_starts(width, window_w, overlap)
    blend = _Blender(blending_profile(window_h), blending_profile(window_w), lefts, width)
    active: list[_WindowRow] = []
    # Between these edges the same windows cover every row.
    edges = sorted({*tops, *(top + window_h for top in tops)})
    for first, last in pairwise(edges):
        active = [row for row in active if row.top + window_h > first]
        if first in tops:
            rows = slice(first, first + window_h)
            maps = [predict_window(rows, slice(left, left + window_w)) for left in lefts]
            active.append(_WindowRow(first, maps))
        for start in range(first, last, max_rows):
            yield start, blend(active, start, min(start + max_rows, last))


@dataclass(frozen=True)
class _Blender:
    """Blends the windows' values; the weights of a pixel are scaled to a sum of 1."""

    row_weights: Tensor
    column_weights: Tensor
    lefts: Sequence[int]
    width: int

    def __call__(self, active: Sequence[_WindowRow], start: int, stop: int) -> Tensor:
        """The values of rows start..stop, [K, rows, W], all of which each of `active` covers."""
        if len(active) == len(self.lefts) == 1:
            return active[0].maps[0].rows(start - active[0].top, stop - active[0].top)
        weights = [self.row_weights[start - row.top : stop - row.top, None] for row in active]
        sum_over_columns = torch.zeros(self.width)
        for columns in self._columns():
            sum_over_columns[columns] += self.column_weights
        norm = torch.stack(weights).sum(dim=0) * sum_over_columns  # [rows, W]
        total = torch.zeros(0)
        for row, row_weight in zip(active, weights, strict=True):
            for columns, window in zip(self._columns(), row.maps, strict=True):
                values = window.rows(start - row.top, stop - row.top)
                if not total.numel():
                    total = values.new_zeros(values.shape[0], stop - start, self.width)
                share = row_weight * self.column_weights / norm[:, columns]
                total[:, :, columns].addcmul_(values, share.to(values.device))
        return total

    def _columns(self) -> list[slice]:
        return [slice(left, left + len(self.column_weights)) for left in self.lefts]
