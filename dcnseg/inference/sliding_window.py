"""Pictures of any size through a network that sees one window at a time, in bounded memory.

Windows overlap, and their probabilities are blended with weights that fall smoothly towards the
window's edge. Results come as bands of rows as soon as no later window touches them, so that memory
grows with the picture's width and the window's height, not with the picture's area.
Entry point: `predict_bands`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

EDGE_WEIGHT = 1e-3  # above zero, so that a pixel seen only by a window's edge keeps its value


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Starts of evenly spread windows that cover 0..length.

    Args:
        length: Pixels to cover.
        window: Pixels of one window.
        overlap: Least share of a window that its neighbour covers too, in [0, 1).
    """
    if length <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    gaps = -(-(length - window) // step)
    return [(length - window) * i // gaps for i in range(gaps + 1)]


def blending_weights(height: int, width: int) -> Tensor:
    """Weights of a window's pixels, 1 in the middle and falling as sin^2 to the edges, [h, w]."""

    def profile(n: int) -> Tensor:
        phase = (torch.arange(n, dtype=torch.float32) + 0.5) * (torch.pi / n)
        return torch.sin(phase).square().clamp_min(EDGE_WEIGHT)

    return profile(height)[:, None] * profile(width)[None, :]


def predict_bands(
    predict_window: Callable[[slice, slice], Tensor],
    size_hw: tuple[int, int],
    window_hw: tuple[int, int],
    overlap: float,
) -> Iterator[tuple[int, Tensor]]:
    """Apply `predict_window` all over a picture and blend.

    Args:
        predict_window: From the rows and columns of a window to its values, [K, h, w].
        size_hw: The picture's size in pixels.
        window_hw: Size of a window; a smaller picture is one smaller window.
        overlap: Least share of a window that its neighbour covers too, in [0, 1).

    Yields:
        First row of a band and its blended values, [K, rows, W]; the bands follow each other from
        the top of the picture to its bottom without gaps.
    """
    height, width = size_hw
    if height <= window_hw[0] and width <= window_hw[1]:
        yield 0, predict_window(slice(0, height), slice(0, width))
        return
    window_h, window_w = min(window_hw[0], height), min(window_hw[1], width)
    tops = window_starts(height, window_h, overlap)
    lefts = window_starts(width, window_w, overlap)
    weights = blending_weights(window_h, window_w)
    total = torch.zeros(0)  # weighted sum over rows top..top + window_h, [K, window_h, W]
    norm = torch.zeros(window_h, width)
    for top, next_top in pairwise([*tops, height]):
        for left in lefts:
            columns = slice(left, left + window_w)
            values = predict_window(slice(top, top + window_h), columns)
            if not total.numel():
                total = values.new_zeros(values.shape[0], window_h, width)
                weights, norm = weights.to(values), norm.to(values)
            total[:, :, columns].addcmul_(values, weights)
            norm[:, columns] += weights
        rows = next_top - top
        yield top, total[:, :rows] / norm[:rows]
        total = _scroll(total, rows)
        norm = _scroll(norm, rows)


def _scroll(buffer: Tensor, rows: int) -> Tensor:
    """Drop the first rows and append as many of zeros."""
    kept = buffer[..., rows:, :]
    return torch.cat([kept, kept.new_zeros(*kept.shape[:-2], rows, kept.shape[-1])], dim=-2)
