"""Class colors over an image, and their legend; entry points `draw_overlay` and `draw_legend`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.config import OVERLAY_OPACITY
from dcnseg.data.class_map import ClassMap
from dcnseg.lettering import INK, WHITE, text_width, write

STRIP_ROWS: Final = 256  # rows drawn at a time, to keep temporary arrays small
PIXELS_PER_LINE_WIDTH: Final = 400  # of the shorter side, for each pixel of a contour's width
BRIGHTNESS_POWER: Final = 0.45  # of the brightest channel in 0..1; dark tints hide dark images

UInt8Array = npt.NDArray[np.uint8]


def draw_overlay(
    image: UInt8Array, labels: UInt8Array, class_map: ClassMap, *, opacity: float = OVERLAY_OPACITY
) -> UInt8Array:
    """Tint an image with the classes' colors, and outline the regions.

    Dark colors are brightened. The background and ignored pixels keep their colors.

    Args:
        image: RGB, uint8 [H, W, 3].
        labels: Training indices, uint8 [H, W]; those without a class are ignored.
        class_map: The classes.
        opacity: Of the tint, from 0 (outlines only) to 1.
    """
    return np.concatenate(list(draw_overlay_strips(image, labels, class_map, opacity=opacity)))


def draw_overlay_strips(
    image: UInt8Array, labels: UInt8Array, class_map: ClassMap, *, opacity: float = OVERLAY_OPACITY
) -> Iterator[UInt8Array]:
    """Yield an overlay from top to bottom, a few rows at a time; see `draw_overlay`."""
    height, width = labels.shape
    reach = 1 + min(height, width) // PIXELS_PER_LINE_WIDTH // 2
    kernel = np.ones((2 * reach + 1,) * 2, np.uint8)
    colors = overlay_colors(class_map)
    is_tinted = np.zeros(256, bool)
    is_tinted[list(class_map.object_indices)] = True
    for top in range(0, height, STRIP_ROWS):
        bottom = min(top + STRIP_ROWS, height)
        first = max(0, top - reach)
        around = labels[first : bottom + reach]  # with the rows that touch the strip
        is_edge = (cv2.dilate(around, kernel) != cv2.erode(around, kernel))[top - first :]
        strip, indices = image[top:bottom], labels[top:bottom]
        tint = cv2.applyColorMap(np.ascontiguousarray(indices), colors[:, None])
        strength = np.where(is_edge[: bottom - top], 1.0, opacity) * is_tinted[indices]
        mixed = strip + strength[..., None].astype(np.float32) * (tint.astype(np.float32) - strip)
        yield np.rint(mixed).astype(np.uint8)


def overlay_colors(class_map: ClassMap) -> UInt8Array:
    """The color in overlays of every training index, uint8 [256, 3]; black without a class."""
    colors = np.zeros((256, 3), np.uint8)
    given = class_map.index_colors()[: class_map.num_classes] / 255.0
    brightest = np.maximum(given.max(1, keepdims=True), 1 / 255)
    colors[: len(given)] = np.rint(255 * given * brightest ** (BRIGHTNESS_POWER - 1))
    return colors


def draw_legend(class_map: ClassMap, present: Collection[int], width: int) -> UInt8Array:
    """Draw a strip with the colors and names of classes but the background, uint8 [h, width, 3].

    Args:
        class_map: The classes.
        present: Training indices of the classes to show.
        width: Width in pixels; the entries wrap.
    """
    colors = overlay_colors(class_map)
    size = int(np.clip(width // 40, 12, 28))
    row_height, swatch = round(1.7 * size), size
    places: list[tuple[int, int, int]] = []
    x, row = size // 2, 0
    for index in sorted(set(present) & set(class_map.object_indices)):
        needed = swatch + size // 2 + text_width(class_map.names[index], size) + size
        if x + needed > width and x > size // 2:
            x, row = size // 2, row + 1
        places.append((index, x, row))
        x += needed
    strip = np.full(((row + 1) * row_height, width, 3), WHITE, np.uint8)
    for index, left, row in places:
        top = row * row_height + (row_height - swatch) // 2
        corner, opposite = (left, top), (left + swatch, top + swatch)
        cv2.rectangle(strip, corner, opposite, colors[index].tolist(), -1)
        cv2.rectangle(strip, corner, opposite, INK, 1)
        write(strip, class_map.names[index], (left + swatch + size // 2, top - size // 8), size)
    return strip


def present_classes(labels: npt.NDArray[Any], num_classes: int) -> list[int]:
    """The training indices below `num_classes` that occur in a label map."""
    counts = np.zeros(256, np.int64)
    for row in labels:  # np.unique of the whole image would sort it
        counts += np.bincount(row, minlength=256)
    return [int(index) for index in np.flatnonzero(counts[:num_classes])]
