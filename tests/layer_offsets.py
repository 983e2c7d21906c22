"""Hand-made offsets of a 3x3 layer, and label maps with known objects."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.ops.offset_stats import OffsetStatistics, TapGrid
from dcnseg.visualize.geometry import MapGeometry
from dcnseg.visualize.offsets import LayerOffsets

CLASSES = ClassMap(
    tuple(
        ClassInfo(i, name, (i, i, i))
        for i, name in enumerate(("background", "disc", "<b>ring</b>"))
    )
)
STRIDE = 4
STEPS = torch.stack(torch.meshgrid(*[torch.arange(-1.0, 2.0)] * 2, indexing="ij"), -1)


def make_layer(
    offset: Tensor, mask: Tensor | None = None, *, name: str = "a", stride_px: float = STRIDE
) -> LayerOffsets:
    """A layer with the offsets [G, 9, 2, H, W] on a map whose pixel i is at `i * stride_px`."""
    grid = TapGrid((3, 3), (1, 1), (1, 1), (1, 1))
    size_hw = int(offset.shape[-2]), int(offset.shape[-1])
    geometry = MapGeometry((stride_px, stride_px), (0.0, 0.0))
    statistics = OffsetStatistics(0.0, 0.0, 0.0, 0.0)
    return LayerOffsets(name, offset, mask, grid, size_hw, geometry, statistics)


def make_zero_offset(size_hw: tuple[int, int], groups: int = 1) -> Tensor:
    return torch.zeros(groups, 9, 2, *size_hw)


def make_radial_offset(scale: Tensor) -> Tensor:
    """Offsets that stretch the grid of each location by `scale`, [H, W]."""
    return ((scale - 1) * STEPS.reshape(1, 9, 2, 1, 1)).contiguous()


def make_labels() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Training indices [64, 80], and the number of the object at each pixel.

    Three objects have the numbers 1 to 3, the background 4; 0 is an object that is too small, and
    -1 ignored.
    """
    labels = np.zeros((64, 80), np.uint8)
    numbers = np.full((64, 80), 4)
    for number, class_index, rows, columns in (
        (1, 1, slice(4, 14), slice(2, 20)),  # small
        (2, 1, slice(20, 60), slice(6, 50)),  # medium
        (3, 2, slice(30, 50), slice(50, 64)),  # touches the second, of another class
        (0, 2, slice(7, 10), slice(71, 74)),
        (-1, 255, slice(0, 20), slice(40, 60)),
    ):
        labels[rows, columns] = class_index
        numbers[rows, columns] = number
    return labels, numbers
