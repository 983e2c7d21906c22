"""Sliding-window prediction of images of any size in bounded memory; entry point `predict_strips`.

Windows overlap, and their probabilities are blended with weights that decrease smoothly towards the
window's edges. A window's result is a `StripMap`: only a strip of a few rows is computed and
blended at a time, so the memory depends on the width of the image, not on its height.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dcnseg.inference.strips import StripMap

EDGE_WEIGHT = 1e-3  # positive, because some pixels are only at the edge of a window


def compute_window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return the starts of evenly spaced windows that cover `length` pixels.

    Args:
        length: Number of pixels to cover.
        window: Window size in pixels.
        overlap: Minimum overlap of neighboring windows as a share of the window, in [0, 1).
    """
    if length <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    gaps = -(-(length - window) // step)
    return [(length - window) * i // gaps for i in range(gaps + 1)]


def find_window_columns(width: int, window: int, overlap: float, columns: slice) -> list[int]:
    """Return the starts of those windows that contain any of `columns`."""
    starts = compute_window_starts(width, window, overlap)
    return [left for left in starts if left < columns.stop and columns.start < left + window]


def compute_blending_weights(length: int) -> Tensor:
    """Return the sin^2 weights of a window's rows or columns, [length], in [EDGE_WEIGHT, 1].

    The weight of a pixel is the product of its row and column weights.
    """
    phase = (torch.arange(length, dtype=torch.float32) + 0.5) * (torch.pi / length)
    return torch.sin(phase).square().clamp_min(EDGE_WEIGHT)


@dataclass(frozen=True)
class _WindowRow:
    """The windows that start in the same image row."""

    top: int
    maps: Sequence[StripMap]  # from left to right


def predict_strips(
    predict_window: Callable[[slice, slice], StripMap],
    size_hw: tuple[int, int],
    window_hw: tuple[int, int],
    overlap: float,
    *,
    max_rows: int,
    columns: slice | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Predict overlapping windows of an image and blend them.

    Args:
        predict_window: Maps the rows and columns of a window to its values [K, rows, columns].
        size_hw: Image size in pixels.
        window_hw: Window size in pixels; clipped to the image size.
        overlap: Minimum overlap of neighboring windows as a share of the window, in [0, 1).
        max_rows: Maximum number of rows of a strip.
        columns: Columns of the image to predict, by default all. Their values do not depend on it,
            because the windows are those of the whole image.

    Yields:
        First row of a strip and its blended values, [K, rows, columns]. The strips cover the image
        from top to bottom without gaps.
    """
    height, width = size_hw
    window_h, window_w = min(window_hw[0], height), min(window_hw[1], width)
    tops = compute_window_starts(height, window_h, overlap)
    columns = columns or slice(0, width)
    lefts = find_window_columns(width, window_w, overlap, columns)
    blend = _Blender(
        compute_blending_weights(window_h), compute_blending_weights(window_w), lefts, columns
    )
    active: list[_WindowRow] = []
    # All rows between two edges are covered by the same windows.
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
    """Weighted mean of the values of overlapping windows."""

    row_weights: Tensor
    column_weights: Tensor
    lefts: Sequence[int]
    columns: slice  # of the image, each in at least one window

    def __call__(self, active: Sequence[_WindowRow], start: int, stop: int) -> Tensor:
        """Blend rows start..stop, which all `active` windows cover, to [K, rows, columns]."""
        parts = self._parts()
        if len(active) == len(self.lefts) == 1:
            values = active[0].maps[0].rows(start - active[0].top, stop - active[0].top)
            return values[..., parts[0][1]]
        weights = [self.row_weights[start - row.top : stop - row.top, None] for row in active]
        width = self.columns.stop - self.columns.start
        sum_over_columns = torch.zeros(width)
        for place, part in parts:
            sum_over_columns[place] += self.column_weights[part]
        norm = torch.stack(weights).sum(dim=0) * sum_over_columns  # [rows, columns]
        total = torch.zeros(0)
        for row, row_weight in zip(active, weights, strict=True):
            for (place, part), window in zip(parts, row.maps, strict=True):
                values = window.rows(start - row.top, stop - row.top)[..., part]
                if not total.numel():
                    total = values.new_zeros(values.shape[0], stop - start, width)
                share = row_weight * self.column_weights[part] / norm[:, place]
                total[:, :, place].addcmul_(values, share.to(values.device))
        return total

    def _parts(self) -> list[tuple[slice, slice]]:
        """Return, for each window, its place in the result and the part of the window there."""
        parts = []
        for left in self.lefts:
            first = max(left, self.columns.start)
            last = min(left + len(self.column_weights), self.columns.stop)
            place = slice(first - self.columns.start, last - self.columns.start)
            parts.append((place, slice(first - left, last - left)))
        return parts
