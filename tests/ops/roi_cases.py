"""Maps, boxes, and the documented formulas, for the tests of several RoI operators."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.ops.roi.checks import Corners

# On a map of 7x9 (height x width), at a scale of 0.5.
FINITE_BOXES: list[list[float]] = [
    [0, 1.2, 0.7, 14.4, 11.5],
    [1, -6, -4, 7.5, 24],  # across the borders
    [1, 40, 40, 60, 60],  # outside
    [0, -18, -19, -8, -10],  # outside, on the opposite side
    [0, 10, 8, 4, 2],  # start and end swapped
    [1, 7, 5, 7, 5],  # a point between pixels
    [1, 2, 2, 17, 13],  # to the last row and column
]
BAD_BOXES: list[list[float]] = [[0, math.nan, 0, 6, 6], [1, 0, 0, math.inf, 6]]


NEAR_BOXES = st.lists(
    st.tuples(st.integers(0, 1), *[st.floats(-8, 24).map(lambda v: round(v * 4) / 4)] * 4),
    min_size=1,
    max_size=5,
).map(lambda boxes: torch.tensor(boxes, dtype=torch.float64))


def random_map(channels: int, size_hw: tuple[int, int] = (7, 9)) -> Tensor:
    """A map of two images with fixed random values."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, *size_hw, dtype=torch.float64, generator=generator)


def random_boxes_within(count: int, low: float, span: tuple[float, ...], seed: int) -> Tensor:
    """Boxes [count, 5] of two images with coordinates from `low` to `low + span`."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 5, dtype=torch.float64, generator=generator)
    boxes = boxes * torch.tensor([2, *span], dtype=torch.float64)
    boxes[:, 1:] += low
    boxes[:, 0] = boxes[:, 0].floor()
    return boxes


def half_away(value: float) -> int:
    """Round half away from zero, exactly."""
    return math.trunc(Fraction(value) + Fraction(1 if value > 0 else -1, 2))


def extent(low: float, high: float, scale: float, corners: Corners | None) -> tuple[float, float]:
    """Start and size of a box along an axis."""
    if corners == "rfcn":
        start = half_away(low) * scale
        return start, max((half_away(high) + 1) * scale - start, 0.1)
    end = half_away(high * scale) + (1 if corners is None else 0)
    return half_away(low * scale), max(end - half_away(low * scale), 1)


def bins_along(
    low: float, high: float, scale: float, k: int, size: int, corners: Corners | None
) -> list[range]:
    """The pixels of each of k bins along an axis."""
    start, length = extent(low, high, scale, corners)
    # floor(i*bin + start) and floor(i*bin) + start round differently.
    within, after = (start, 0) if corners == "rfcn" else (0, int(start))
    bins = []
    for i in range(k):
        begin = math.floor(i * (length / k) + within) + after
        end = math.ceil((i + 1) * (length / k) + within) + after
        bins.append(range(min(max(begin, 0), size), min(max(end, 0), size)))
    return bins


def samples_along(
    mode: str, low: float, high: float, scale: float, k: int, size: int, ratio: int
) -> tuple[list[tuple[float, float, int]], float]:
    """First sample, step and number of samples of k bins along an axis, and the box's size."""
    if mode == "paper":
        pixels = bins_along(low, high, scale, k, size, None)
        return [(each.start, 1.0, len(each)) for each in pixels], extent(low, high, scale, None)[1]
    if mode == "mmcv":
        start = low * scale - 0.5
        length = high * scale - 0.5 - start
        count = ratio or max(math.ceil(length / k), 0)
    else:
        start, length = extent(low, high, scale, "rfcn")
        start, count = start - 0.5, ratio or 4
    step = length / k / max(count, 1)
    first = start + (0.5 * step if mode == "mmcv" else 0.0)
    return [(first + i * length / k, step, count) for i in range(k)], length
