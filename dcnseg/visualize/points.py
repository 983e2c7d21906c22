"""Points to draw: chosen from a prediction, and traced back through the deformable layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import ClassMap
from dcnseg.errors import ConfigError
from dcnseg.scoring.objects import find_objects
from dcnseg.visualize.charts import shorten
from dcnseg.visualize.offsets import (
    CASCADE_DEPTH,
    LayerOffsets,
    SamplingPoints,
    trace_cascade,
)

MIN_OBJECT_SHARE: Final = 5e-4  # of the image's area; smaller objects are mostly noise
Point = tuple[float, float]


@dataclass(frozen=True)
class NamedPoint:
    """A point (x, y) in image pixels, and what it is on, if it was chosen for that."""

    xy: Point
    name: str = ""

    @property
    def title(self) -> str:
        """The name and the coordinates."""
        return f"{shorten(self.name, 40)} ({self.xy[0]:g}, {self.xy[1]:g})".lstrip()


@dataclass(frozen=True)
class TracedPoint:
    """The sampling points of a point: of the last layer and of the cascade, each also plain."""

    last_plain: SamplingPoints
    last: SamplingPoints
    plain: SamplingPoints
    cascade: SamplingPoints


def trace_point(layers: Sequence[LayerOffsets], point_xy: Point) -> TracedPoint:
    """Trace a point through the last layer and through the last `CASCADE_DEPTH` layers."""
    last, cascade = layers[-1:], layers[-CASCADE_DEPTH:]
    return TracedPoint(
        trace_cascade(last, point_xy, is_plain=True),
        trace_cascade(last, point_xy),
        trace_cascade(cascade, point_xy, is_plain=True),
        trace_cascade(cascade, point_xy),
    )


def choose_points(labels: npt.NDArray[np.uint8], class_map: ClassMap) -> list[NamedPoint]:
    """Choose the innermost pixels of the background, of a small and of a large object.

    Without objects, the points are those of `make_grid_points`.

    Args:
        labels: Predicted training indices, uint8 [H, W].
        class_map: The classes.
    """
    objects = find_objects(labels, class_map.object_indices)
    if not len(objects):
        return [NamedPoint(xy) for xy in make_grid_points(labels.shape)]
    is_clear = objects.areas >= MIN_OBJECT_SHARE * labels.size
    numbers = np.flatnonzero(is_clear if is_clear.any() else np.ones(len(objects), bool))
    numbers = numbers[np.argsort(objects.areas[numbers], kind="stable")]
    points = []
    is_background = ~np.isin(labels, [*class_map.object_indices, 255])
    if is_background.any():
        points.append(NamedPoint(_find_innermost(is_background), "background"))
    sizes = ("small", "large") if len(numbers) > 1 else ("single",)
    for size, number in zip(sizes, (numbers[0], numbers[-1]), strict=False):
        name = class_map.names[objects.class_indices[number]]
        is_object = objects.numbers == number + 1
        points.append(NamedPoint(_find_innermost(is_object), f"{size} object, {name}"))
    return points


def make_grid_points(image_hw: tuple[int, ...], columns: int = 3, rows: int = 3) -> list[Point]:
    """Return an evenly spaced grid of points (x, y), in image pixels, row by row."""
    height, width = image_hw
    points = [
        (
            float((2 * column + 1) * width // (2 * columns)),
            float((2 * row + 1) * height // (2 * rows)),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return list(dict.fromkeys(points))


def check_points(points: Sequence[Point], image_hw: tuple[int, int]) -> None:
    """Raise a ConfigError that names the first point outside the image."""
    height, width = image_hw
    for x, y in points:
        # written to refuse NaN as well
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            raise ConfigError(
                f"The point {x:g},{y:g} is outside the image of {width}x{height} pixels; expected "
                f"x in 0..{width - 1} and y in 0..{height - 1}."
            )


def _find_innermost(mask: npt.NDArray[np.bool_]) -> Point:
    """Return the pixel (x, y) of a mask that is farthest from its border and the image's."""
    padded = np.pad(mask, 1).view(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return float(x - 1), float(y - 1)
