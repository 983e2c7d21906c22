"""The figure of the bins of regions, as an RGB array; entry point `draw_region_bins`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np

from dcnseg.data.class_map import ClassMap
from dcnseg.inference.overlay import overlay_colors
from dcnseg.lettering import INK, WHITE, Color, text_width, write
from dcnseg.visualize.canvas import Floats, Panel, Rgb, compose
from dcnseg.visualize.drawing import PALE, RED
from dcnseg.visualize.region_bins import RegionBins

PANEL_SIDE: Final = 480  # longer side of a panel, in canvas pixels
DASH, DASH_GAP = 7.0, 5.0  # canvas pixels
MAX_DETAILED_BINS: Final = 5  # k; with more bins, lines are thin and centers are not drawn
NUMBER_SIZE: Final = 17
FILL_OPACITY: Final = 0.12
FADE: Final = 0.45  # of the image's colors to gray, below the bins
MAX_MARGIN_SHARE: Final = 0.75
"""Maximum margin around a region's box and plain bins, as a share of their longer side."""


def draw_region_bins(image: Rgb, bins: Sequence[RegionBins], class_map: ClassMap) -> Rgb:
    """Draw the image with the boxes of regions, and each region with its plain and moved bins.

    Bins beyond `MAX_MARGIN_SHARE` are counted in the caption.

    Args:
        image: RGB, uint8 [H, W, 3].
        bins: The bins of at least one region.
        class_map: The classes.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", Figure 7.
    """
    colors = [_get_color(entry, class_map) for entry in bins]
    panels = [("Input image, boxes of the regions", _draw_boxes(image, bins, colors))]
    gray = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    faded = np.rint((1 - FADE) * image + FADE * gray).astype(np.uint8)
    for number, (entry, color) in enumerate(zip(bins, colors, strict=True), 1):
        name = f"{number}. {class_map.names[entry.class_index]} score {entry.region.score:.2f}"
        panels.append(_draw_region(faded, entry, color, name))
    kh, kw = bins[0].plain.shape[:2]
    notes = [
        f"Dashed: the {kh}x{kw} bins of plain pooling. Red: the bins moved by their offsets. Frame "
        "in the color of the class: the region's box.",
        "A bin consists of whole pixels of the feature map. It can overlap others and exceed the "
        "box.",
        "Lengths are in image pixels. Hatched: outside the image.",
    ]
    return compose(panels, _count_columns(len(panels)), "Region head: bins of regions", notes)


def _draw_boxes(image: Rgb, bins: Sequence[RegionBins], colors: Sequence[Color]) -> Rgb:
    """Draw the whole image and the numbered boxes of the regions, the smallest in front."""
    height, width = image.shape[:2]
    panel = Panel.from_window(image, (0, 0, width, height), PANEL_SIDE)
    for index in sorted(range(len(bins)), key=lambda i: -bins[i].region.area):
        box = np.array(bins[index].region.box_xyxy, np.float64)
        _outline(panel, box[None], INK, 4)
        _outline(panel, box[None], colors[index], 2)
        left, top = np.rint(panel.place(box[:2] - 0.5)).astype(int).clip(min=0).tolist()
        _label(panel.canvas, str(index + 1), (left, top), colors[index])
    return panel.canvas


def _draw_region(image: Rgb, entry: RegionBins, color: Color, name: str) -> tuple[str, Rgb]:
    """Return the caption and the panel of a region."""
    box = np.array([entry.region.box_xyxy], np.float64)
    plain, moved = (boxes.reshape(-1, 4) for boxes in (entry.plain, entry.moved))
    has_pixels = (plain[:, 2:] > plain[:, :2]).all(1)
    plain, moved = plain[has_pixels], moved[has_pixels]
    panel = Panel.from_window(
        image, _choose_window(np.concatenate([box, plain]), moved), PANEL_SIDE
    )
    is_detailed = len(entry.plain) <= MAX_DETAILED_BINS
    _fill(panel, moved, RED)
    _outline(panel, box, INK, 5)
    _outline(panel, box, color, 3)
    if is_detailed:
        _outline(panel, plain, INK, 3, is_dashed=True)
    _outline(panel, plain, PALE, 1, is_dashed=True)
    if is_detailed:
        _outline(panel, moved, WHITE, 4)
    _outline(panel, moved, RED, 2 if is_detailed else 1)
    if is_detailed:
        starts, ends = _centers(plain), _centers(moved)
        for ink, width in ((WHITE, 4), (RED, 2)):
            panel.segments(starts, ends, ink, width)
        panel.dots(starts, 2.5, PALE, INK)
        panel.dots(ends, 4.0, RED, WHITE)
    left, top, right, bottom = entry.region.box_xyxy
    caption = f"{name}, {right - left}x{bottom - top} px"
    return caption + _describe_offsets(entry, panel, moved), panel.canvas


def _describe_offsets(entry: RegionBins, panel: Panel, moved: Floats) -> str:
    lengths = entry.lengths_px
    finite = lengths[np.isfinite(lengths)]
    text = f", mean offset {finite.mean():.3g} px" if len(finite) else ""
    if len(finite) < lengths.size:
        text += f", {lengths.size - len(finite)} not finite"
    is_finite = np.isfinite(moved).all(1)
    num_beyond = int((is_finite & ~panel.is_within(_centers(moved))).sum())
    return text + (f", {num_beyond} beyond the margin" if num_beyond else "")


def _choose_window(still: Floats, moved: Floats) -> tuple[int, int, int, int]:
    """Return a square window around boxes, with `moved` as far as the margin allows."""
    low, high = still[:, :2].min(0), still[:, 2:].max(0)
    reach = MAX_MARGIN_SHARE * (high - low).max()
    finite = moved[np.isfinite(moved).all(1)]
    if len(finite):
        outer_low, outer_high = finite[:, :2].min(0), finite[:, 2:].max(0)
        low, high = (
            np.maximum(np.minimum(low, outer_low), low - reach),
            np.minimum(np.maximum(high, outer_high), high + reach),
        )
    side = int(np.ceil(1.08 * (high - low).max())) + 2
    left, top = np.rint((low + high - side) / 2).astype(int).tolist()
    return left, top, left + side, top + side


def _outline(
    panel: Panel, boxes: Floats, color: Color, width: int, *, is_dashed: bool = False
) -> None:
    """Draw the edges of boxes [N, 4], in image pixels from the corner of the image."""
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] - 0.5  # [N, 4, 2]
    starts, ends = corners.reshape(-1, 2), np.roll(corners, -1, axis=1).reshape(-1, 2)
    if is_dashed:
        starts, ends = _dash(starts, ends, panel.scale_xy[0])
    panel.segments(starts, ends, color, width)


def _dash(starts: Floats, ends: Floats, scale: float) -> tuple[Floats, Floats]:
    """Cut segments into dashes that start and end at their ends."""
    pieces = []
    for start, end in zip(starts, ends, strict=True):
        length = float(np.linalg.norm(end - start)) * scale
        count = max(round((length - DASH) / (DASH + DASH_GAP)) + 1, 1)
        period = (length - DASH) / max(count - 1, 1)
        first = np.arange(count)[:, None] * period / max(length, 1e-9)
        last = np.minimum(first + DASH / max(length, 1e-9), 1.0)
        pieces.append((start + first * (end - start), start + last * (end - start)))
    empty = np.empty((0, 2))
    return (
        np.concatenate([empty, *(first for first, _ in pieces)]),
        np.concatenate([empty, *(last for _, last in pieces)]),
    )


def _fill(panel: Panel, boxes: Floats, color: Color) -> None:
    """Tint boxes [N, 4]; where boxes overlap, the tint is stronger."""
    height, width = panel.canvas.shape[:2]
    for box in boxes[np.isfinite(boxes).all(1)]:
        edges = panel.place(box.reshape(2, 2) - 0.5) + 0.5
        (x, y), (x_end, y_end) = np.rint(edges.clip(0, [width, height])).astype(int).tolist()
        part = panel.canvas[y:y_end, x:x_end]
        part[:] = np.rint((1 - FILL_OPACITY) * part + FILL_OPACITY * np.array(color))


def _label(canvas: Rgb, text: str, corner_xy: tuple[int, int], color: Color) -> None:
    """Write a text on a tag above a corner, or below it at the upper edge of the image."""
    width, height = text_width(text, NUMBER_SIZE) + 10, NUMBER_SIZE + 6
    x = min(corner_xy[0], canvas.shape[1] - width - 1)
    y = corner_xy[1] - height if corner_xy[1] >= height else corner_xy[1]
    y = min(y, canvas.shape[0] - height - 1)
    cv2.rectangle(canvas, (x, y), (x + width, y + height), color, -1)
    cv2.rectangle(canvas, (x, y), (x + width, y + height), INK, 1)
    is_dark = float(np.dot(color, (0.299, 0.587, 0.114))) < 140
    write(canvas, text, (x + 5, y + 1), NUMBER_SIZE, WHITE if is_dark else INK)


def _get_color(entry: RegionBins, class_map: ClassMap) -> Color:
    red, green, blue = overlay_colors(class_map)[entry.class_index].tolist()
    return red, green, blue


def _centers(boxes: Floats) -> Floats:
    """Return the centers of boxes [N, 4], [N, 2], counted from the center of the first pixel."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5


def _count_columns(num_panels: int) -> int:
    return num_panels if num_panels <= 3 else 2 if num_panels == 4 else 4 if num_panels > 6 else 3
