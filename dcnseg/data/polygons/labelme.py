"""Reads LabelMe files, one per image; the entry point is `parse_labelme`."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from dcnseg.data.class_info import is_class_name
from dcnseg.data.polygons.shapes import (
    Annotation,
    Shape,
    read_json,
    read_points,
    read_ring,
    read_shapes,
    read_size_hw,
)
from dcnseg.errors import DataError, short_repr

_CIRCLE_CORNERS: Final = 72
_KINDS: Final = ("polygon", "rectangle", "circle", "mask", "line", "linestrip", "point", "points")


def is_labelme(path: Path) -> bool:
    """Whether a file is a LabelMe file; False if it is not valid JSON."""
    try:
        return looks_like_labelme(read_json(path))
    except DataError:
        return False


def looks_like_labelme(content: Any) -> bool:
    """Whether the content of a JSON file has the form of LabelMe."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def parse_labelme(content: Any, path: Path) -> Annotation:
    """Return the shapes of a LabelMe file: polygons, rectangles, circles and masks.

    Raises:
        DataError: A shape is damaged or has no area, such as a point or line.
    """
    height, width = content.get("imageHeight"), content.get("imageWidth")
    size_hw = None if height is None or width is None else read_size_hw(height, width, f"{path}:")
    shapes = read_shapes(enumerate(content["shapes"]), lambda item: _shape(item, path))
    return Annotation(size_hw, shapes)


def _shape(item: tuple[int, Any], path: Path) -> Shape:
    index, entry = item
    if not isinstance(entry, dict) or not is_class_name(entry.get("label")):
        raise DataError(f"{path}: shapes[{index}] has no label; expected text on one line.")
    name, kind = entry["label"].strip(), entry.get("shape_type") or "polygon"
    shown = kind if kind in _KINDS else f"shape of the type {short_repr(kind)}"
    what = f"{path}: shapes[{index}], a {shown} of {short_repr(name)},"
    points = entry.get("points")
    if kind == "polygon":
        return Shape(name, (read_ring(points, what),))
    corners = read_points(points, what)
    if kind == "rectangle" and len(corners) in (2, 4):
        return Shape(name, (_rectangle(corners),))
    if kind == "circle" and len(corners) == 2:
        return Shape(name, (_circle(corners),))
    if kind == "mask" and len(corners) == 2:
        left, top = np.floor(corners.min(axis=0)).astype(int).tolist()
        right, bottom = np.floor(corners.max(axis=0)).astype(int).tolist()
        box_hw = (bottom - top + 1, right - left + 1)
        return Shape(name, (), _embedded_mask(entry.get("mask"), box_hw, what), (top, left))
    raise DataError(f"{what} has no area. Draw a polygon, or remove it.")


def _rectangle(corners: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    (left, top), (right, bottom) = corners.min(axis=0), corners.max(axis=0)
    if len(corners) == 4:
        return corners
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def _circle(corners: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return a polygon around the center, the first point; the second is on the edge."""
    center, edge = corners
    angles = np.linspace(0, 2 * np.pi, _CIRCLE_CORNERS, endpoint=False)
    radius = float(np.linalg.norm(edge - center))
    return np.asarray(center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1))


def _embedded_mask(text: Any, box_hw: tuple[int, int], what: str) -> npt.NDArray[np.bool_]:
    """Decode the base64 PNG of a shape of the kind "mask".

    LabelMe includes the last row and column in the box, other programs do not.
    """
    height, width = box_hw
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width not in (width, width - 1) or image.height not in (height, height - 1):
                raise DataError(
                    f"{what} has a mask of {image.width}x{image.height} pixels, but its box "
                    f"has {width}x{height}."
                )
            return np.asarray(image.convert("L")) > 0
    except DataError:
        raise
    # Pillow's decoders raise many types of exceptions for damaged files.
    except Exception as error:
        raise DataError(f"{what} has a mask that cannot be decoded ({error}).") from error
