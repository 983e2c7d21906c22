"""The annotated shapes of one image in a LabelMe or COCO file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from dcnseg import files
from dcnseg.data.polygons.rasters import BoolArray, fill_ring
from dcnseg.errors import DataError, short_repr
from dcnseg.files import explain_unreadable

_MAX_PIXELS: Final = 178_956_970  # Pillow's limit
_MAX_COORDINATE: Final = 1e9

Raw = TypeVar("Raw")


@dataclass(frozen=True)
class Shape:
    """An area of one class: the union of outlines and pixels."""

    name: str  # of the class
    rings: tuple[npt.NDArray[np.float64], ...] = ()  # corners (x, y) of each outline, [N, 2]
    pixels: BoolArray | None = None  # bool [h, w]
    corner: tuple[int, int] = (0, 0)  # row and column of the upper left element of `pixels`


@dataclass(frozen=True)
class Annotation:
    """The shapes of an image, later ones on top; the size is None if the file has none."""

    size_hw: tuple[int, int] | None
    shapes: tuple[Shape, ...]


def draw_shape(canvas: npt.NDArray[np.int32], shape: Shape, value: int) -> None:
    """Set the pixels of a shape in `canvas`, ids [H, W], to `value`."""
    height, width = canvas.shape
    for ring in shape.rings:
        low = np.clip(np.floor(ring.min(axis=0)), 0, (width, height)).astype(int)  # x, y
        high = np.clip(np.ceil(ring.max(axis=0)), 0, (width, height)).astype(int)
        part = canvas[low[1] : high[1], low[0] : high[0]]
        if part.size:
            part[fill_ring((part.shape[0], part.shape[1]), ring - low)] = value
    if shape.pixels is not None:
        row, column = shape.corner
        rows = slice(max(0, -row), max(0, height - row))
        columns = slice(max(0, -column), max(0, width - column))
        inside = shape.pixels[rows, columns]
        part = canvas[max(0, row) :, max(0, column) :][: inside.shape[0], : inside.shape[1]]
        part[inside] = value


def read_shapes(entries: Iterable[Raw], read: Callable[[Raw], Shape]) -> tuple[Shape, ...]:
    """Read the shapes of one image.

    Raises:
        DataError: A shape is invalid; gives the first reason and the number of others.
    """
    shapes: list[Shape] = []
    errors: list[DataError] = []
    for entry in entries:
        try:
            shapes.append(read(entry))
        except DataError as error:
            errors.append(error)
    if errors:
        rest = len(errors) - 1
        more = f" The same image has {rest} more shapes that cannot be drawn." if rest else ""
        raise DataError(f"{errors[0]}{more}")
    return tuple(shapes)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; DataError if it cannot be read."""
    with explain_unreadable(path, "valid JSON"):
        return files.read_json(path)


def read_points(points: Any, what: str) -> npt.NDArray[np.float64]:
    """Return points as an array [N, 2], N >= 1; DataError that begins with `what` otherwise."""
    try:
        values = np.asarray(points, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{what} has points that are not numbers.") from error
    if values.ndim != 2 or values.shape[1] != 2 or not (np.abs(values) < _MAX_COORDINATE).all():
        raise DataError(f"{what} has invalid points; expected pairs of numbers, in pixels.")
    return values


def read_ring(points: Any, what: str) -> npt.NDArray[np.float64]:
    """Return at least three points, like `read_points`."""
    ring = read_points(points, what)
    if len(ring) < 3:
        raise DataError(f"{what} has {len(ring)} points; expected at least three.")
    return ring


def read_size_hw(height: Any, width: Any, what: str) -> tuple[int, int]:
    """Return an image size; DataError that begins with `what` if it is invalid."""
    for value in (height, width):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 1 <= value < _MAX_COORDINATE or value != int(value):
            size = f"{short_repr(width)} x {short_repr(height)}"
            raise DataError(f"{what} has the size {size}; expected positive integers.")
    if height * width > _MAX_PIXELS:
        raise DataError(
            f"{what} has the size {width} x {height}; expected at most {_MAX_PIXELS} pixels."
        )
    return int(height), int(width)
