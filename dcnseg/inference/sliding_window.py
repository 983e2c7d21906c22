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
) -> Iterator[tuple[int, Tensor]]:
    """Predict overlapping windows of an image and blend them.

    Args:
        predict_window: Maps the rows and columns of a window to its values [K, rows, columns].
        size_hw: Image size in pixels.
        window_hw: Window size in pixels; clipped to the image size.
        overlap: Minimum overlap of neighboring windows as a share of the window, in [0, 1).
        max_rows: Maximum number of rows of a strip.

    Yields:
        First row of a strip and its blended values, [K, rows, W]. The strips cover the image from
        top to bottom without gaps.
    """
    height, width = size_hw
    window_h, window_w = min(window_hw[0], height), min(window_hw[1], width)
    tops = compute_window_starts(height, window_h, overlap)
    lefts = compute_window_starts(width, window_w, overlap)
    blend = _Blender(
        compute_blending_weights(window_h), compute_blending_weights(window_w), lefts, width
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
    width: int

    def __call__(self, active: Sequence[_WindowRow], start: int, stop: int) -> Tensor:
        """Blend rows start..stop, which all `active` windows cover, to [K, rows, W]."""
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
