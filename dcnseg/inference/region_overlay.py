"""Boxes and labels of regions over an overlay; entry points `lay_out_regions` and `draw_marks`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import ClassMap
from dcnseg.inference.overlay import overlay_colors
from dcnseg.inference.regions import Region
from dcnseg.lettering import INK, WHITE, Color, text_width, write

PIXELS_PER_LINE_WIDTH: Final = 800  # of the shorter side, for each pixel of a line's width
FRAME_SHARE: Final = 0.25  # of the image; a larger box only frames it, so it has no lines
CLEAR_LABELS: Final = 6  # a box of fewer labels is never covered by one
DARK: Final = 140  # gray levels below get white text
CENTER_SIDE: Final = 256  # pixels to which a region is reduced to find its center

UInt8Array = npt.NDArray[np.uint8]


class Mark(NamedTuple):
    """What is drawn for a region.

    Attributes:
        box_xyxy: The box in pixels, the last two exclusive; None if it only frames the image.
        color: Of the class.
        width: Of the lines in pixels.
        label: The class and the score, RGB uint8 [h, w, 3]; None if there is no room.
        corner_xy: The left and top of the label.
    """

    box_xyxy: tuple[int, int, int, int] | None
    color: Color
    width: int
    label: UInt8Array | None
    corner_xy: tuple[int, int]


def lay_out_regions(
    regions: Sequence[Region], numbers: npt.NDArray[np.int32], class_map: ClassMap
) -> list[Mark]:
    """Place the boxes and labels of regions, large regions first.

    A label is beside its box, in it if it is large, or in the middle of a region that has no box.
    Labels overlap neither each other nor small boxes; a label without such a place is left out.

    Args:
        regions: The regions of an image.
        numbers: 1 + the index in `regions` at every pixel, 0 for none, int32 [H, W].
        class_map: The classes.
    """
    height, width = numbers.shape
    text_size = int(np.clip(max(height, width) // 80, 11, 24))
    line = 1 + min(height, width) // PIXELS_PER_LINE_WIDTH
    colors = overlay_colors(class_map)
    labels = [
        _draw_label(
            f"{class_map.names[region.class_index]} {region.score:.2f}",
            text_size,
            _as_color(colors[region.class_index]),
        )
        for region in regions
    ]
    is_taken = np.zeros((height, width), bool)
    for region, label in zip(regions, labels, strict=True):
        if _box_area(region) < CLEAR_LABELS * label[..., 0].size:
            left, top, right, bottom = region.box_xyxy
            is_taken[top:bottom, left:right] = True
    marks = []
    for index in sorted(range(len(regions)), key=lambda index: -regions[index].area):
        region, label = regions[index], labels[index]
        has_box = _box_area(region) < FRAME_SHARE * height * width
        if has_box:
            corners = _corners_beside(region.box_xyxy, label.shape[:2], width)
        else:
            corners = iter([_center(numbers, index + 1, label.shape[:2])])
        corner = next((xy for xy in corners if _is_free(is_taken, xy, label)), None)
        if corner is not None:
            is_taken[_cover(corner, label)] = True
        marks.append(
            Mark(
                region.box_xyxy if has_box else None,
                _as_color(colors[region.class_index]),
                line,
                None if corner is None else label,
                corner or (0, 0),
            )
        )
    return marks


def draw_marks(strip: UInt8Array, marks: Sequence[Mark], top: int = 0) -> None:
    """Draw the boxes, then the labels, over a strip of an image in place.

    Args:
        strip: RGB, uint8 [h, W, 3].
        marks: From `lay_out_regions`.
        top: The strip's first row in the image.
    """
    for mark in marks:
        if mark.box_xyxy is not None:
            left, first, right, last = mark.box_xyxy
            start, end = (left, first - top), (right - 1, last - 1 - top)
            cv2.rectangle(strip, start, end, mark.color, mark.width)
    for mark in marks:
        if mark.label is not None:
            left, first = mark.corner_xy[0], mark.corner_xy[1] - top
            height, width = mark.label.shape[:2]
            part = strip[max(0, first) : max(0, first + height), left : left + width]
            part[:] = mark.label[max(0, -first) :][: len(part)]


def _draw_label(text: str, size: int, color: Color) -> UInt8Array:
    """Write text on a strip of a class's color, uint8 [h, w, 3]."""
    pad = size // 3
    label = np.full((round(1.3 * size), text_width(text, size) + 2 * pad, 3), color, np.uint8)
    is_dark = cv2.cvtColor(label[:1, :1], cv2.COLOR_RGB2GRAY).item() < DARK
    write(label, text, (pad, 0), size, WHITE if is_dark else INK)
    return label


def _corners_beside(
    box_xyxy: Sequence[int], label_hw: Sequence[int], image_width: int
) -> Iterator[tuple[int, int]]:
    """Yield places of a label above and below its box, then in it; the best first."""
    left, top, right, bottom = box_xyxy
    height, width = label_hw
    # At the right edge of the image, a label starts to the left of its box.
    starts = (max(0, min(left, image_width - width)), max(0, right - width))
    for y in (top - height, bottom, top):
        for x in starts:
            yield x, y


def _center(
    numbers: npt.NDArray[np.int32], number: int, label_hw: Sequence[int]
) -> tuple[int, int]:
    """The place of a label in the middle of a region: around the pixel farthest from its edges."""
    step = -(-max(numbers.shape) // CENTER_SIDE)
    is_region = np.pad(numbers[::step, ::step] == number, 1)
    distance = cv2.distanceTransform(is_region.view(np.uint8), cv2.DIST_L2, 3)
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return int(x - 1) * step - label_hw[1] // 2, int(y - 1) * step - label_hw[0] // 2


def _is_free(
    is_taken: npt.NDArray[np.bool_], corner_xy: tuple[int, int], label: UInt8Array
) -> bool:
    """Whether a label lies in the image, and covers nothing that has to be seen."""
    left, top = corner_xy
    bottom, right = top + label.shape[0], left + label.shape[1]
    is_inside = (
        left >= 0 and top >= 0 and bottom <= is_taken.shape[0] and right <= is_taken.shape[1]
    )
    return is_inside and not is_taken[_cover(corner_xy, label)].any()


def _cover(corner_xy: tuple[int, int], label: UInt8Array) -> tuple[slice, slice]:
    left, top = corner_xy
    return slice(top, top + label.shape[0]), slice(left, left + label.shape[1])


def _box_area(region: Region) -> int:
    left, top, right, bottom = region.box_xyxy
    return (right - left) * (bottom - top)


def _as_color(rgb: UInt8Array) -> Color:
    red, green, blue = rgb.tolist()
    return red, green, blue
