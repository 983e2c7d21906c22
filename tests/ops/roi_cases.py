"""Maps and boxes that the tests of several RoI operators pool."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

# On a map of 7x9 (height x width), at a scale of 0.5.
FINITE_BOXES: list[list[float]] = [
    [0, 1.2, 0.7, 14.4, 11.5],
    [1, -6, -4, 7.5, 24],  # over the edges
    [1, 40, 40, 60, 60],  # outside
    [0, -18, -19, -8, -10],  # outside, on the other side
    [0, 10, 8, 4, 2],  # turned round
    [1, 7, 5, 7, 5],  # a point between pixels
    [1, 2, 2, 17, 13],  # to the last row and column
]
BAD_BOXES: list[list[float]] = [[0, math.nan, 0, 6, 6], [1, 0, 0, math.inf, 6]]


def half_away(value: float) -> int:
    """Round half away from zero, exactly."""
    return math.trunc(Fraction(value) + Fraction(1 if value > 0 else -1, 2))


def random_map(channels: int, size_hw: tuple[int, int] = (7, 9)) -> Tensor:
    """Two images, the same ones at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, *size_hw, dtype=torch.float64, generator=generator)


def random_boxes_within(count: int, low: float, span: tuple[float, ...], seed: int) -> Tensor:
    """Boxes [count, 5] with coordinates from `low` to `low` and `span`, of two images."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 5, dtype=torch.float64, generator=generator)
    boxes = boxes * torch.tensor([2, *span], dtype=torch.float64)
    boxes[:, 1:] += low
    boxes[:, 0] = boxes[:, 0].floor()
    return boxes
