"""Maps and boxes of the tests of several RoI operators."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

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
