"""The figure of the bins of regions; entry point `draw_region_bins`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from dcnseg.data.class_map import ClassMap
from dcnseg.visualize.charts import INK, shorten
from dcnseg.visualize.figures.panels import (
    MOVED,
    PANEL_STYLE,
    PLAIN,
    Floats,
    Rgb,
    Window,
    draw_dots,
    draw_lines,
    fade,
    find_class_color,
    find_window,
    is_within,
    make_sheet,
    show_image,
    tag,
)
from dcnseg.visualize.region_bins import RegionBins

PANEL_SIDE: Final = 3.4  # inches
MAX_DETAILED_BINS: Final = 5  # k; with more bins, lines are thin and centers are not drawn
FILL_OPACITY: Final = 0.12
LEGEND_WIDTH: Final = 1.4
MAX_MARGIN_SHARE: Final = 0.75
"""Maximum margin around a region's box and plain bins, as a share of their longer side."""


@matplotlib.rc_context(PANEL_STYLE)
def draw_region_bins(image: Rgb, bins: Sequence[RegionBins], class_map: ClassMap) -> Figure:
    """Draw the image with the boxes of regions, and each region with its plain and moved bins.

    Bins beyond `MAX_MARGIN_SHARE` are counted in the caption.

    Args:
        image: RGB, uint8 [H, W, 3].
        bins: The bins of at least one region.
        class_map: The classes.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", Figure 7.
    """
    colors = [find_class_color(class_map, entry.class_index) for entry in bins]
    windows = [find_window(image), *(_choose_window(entry) for entry in bins)]
    captions = ["Input image, boxes of the regions"]
    for number, (entry, window) in enumerate(zip(bins, windows[1:], strict=True), 1):
        name = shorten(class_map.names[entry.class_index], 40)
        captions.append(
            f"{number}. {name} score {entry.region.score:.2f}{_describe(entry, window)}"
        )
    kh, kw = bins[0].plain.shape[:2]
    notes = [
        f"The {kh}x{kw} bins of pooling, plain and moved by their offsets. A bin consists of whole "
        "pixels of the feature map. It can overlap others and exceed the box. Hatched: outside the "
        "image.",
    ]
    columns = _count_columns(len(captions))
    keys = [0.0] * (columns - 1) + [LEGEND_WIDTH]
    title = "Region head: bins of regions"
    sheet = make_sheet(title, notes, captions, windows, columns, keys, PANEL_SIDE)
    _draw_boxes(sheet.axes[0], image, bins, colors)
    faded = fade(image)
    for axes, entry, color, window in zip(sheet.axes[1:], bins, colors, windows[1:], strict=True):
        show_image(axes, faded, window)
        _draw_region(axes, entry, color)
    handles = [
        Line2D([], [], color=MOVED, linewidth=1.6, label="moved bins"),
        Line2D([], [], color=INK, linewidth=1.0, linestyle="--", label="plain bins"),
        Line2D([], [], color=colors[0], linewidth=2.2, label="box (color\nof the class)"),
    ]
    sheet.add_legend(columns - 1, handles)
    return sheet.figure


def _draw_boxes(axes: Axes, image: Rgb, bins: Sequence[RegionBins], colors: Sequence[str]) -> None:
    """Draw the whole image and the numbered boxes of the regions, the smallest in front."""
    show_image(axes, image, find_window(image))
    for index in sorted(range(len(bins)), key=lambda i: -bins[i].region.area):
        box = np.array([bins[index].region.box_xyxy], np.float64)
        draw_lines(axes, _find_edges(box), colors[index], 1.4)
        tag(axes, str(index + 1), (float(box[0, 0]) - 0.5, float(box[0, 1]) - 0.5), colors[index])


def _draw_region(axes: Axes, entry: RegionBins, color: str) -> None:
    box = np.array([entry.region.box_xyxy], np.float64)
    plain, moved = _select_bins(entry)
    is_detailed = len(entry.plain) <= MAX_DETAILED_BINS
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    side = max(right - left, bottom - top)
    for x, y, x_end, y_end in moved[(np.abs(moved) < 20 * side).all(1)]:
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                x_end - x,
                y_end - y,
                color=MOVED,
                alpha=FILL_OPACITY,
                linewidth=0,
            )
        )
    draw_lines(axes, _find_edges(box), color, 2.0)
    _draw_dashes(axes, plain)
    draw_lines(axes, _find_edges(moved), MOVED, 1.4 if is_detailed else 0.7, outline="white")
    if is_detailed:
        starts, ends = _find_centers(plain), _find_centers(moved)
        draw_lines(axes, np.stack([starts, ends], 1), MOVED, 1.4, outline="white")
        draw_dots(axes, starts, 3.5, PLAIN, edge=INK)
        draw_dots(axes, ends, 5.5, MOVED)


def _draw_dashes(axes: Axes, boxes: Floats) -> None:
    """Draw the edges of boxes dashed: pale dashes on a dark line."""
    for x, y, x_end, y_end in boxes:
        frame = Rectangle((x - 0.5, y - 0.5), x_end - x, y_end - y, fill=False, zorder=3)
        frame.set(edgecolor="white", linewidth=0.9, linestyle=(0, (4, 3)))
        frame.set_path_effects([patheffects.withStroke(linewidth=2.0, foreground=INK)])
        axes.add_patch(frame)


def _select_bins(entry: RegionBins) -> tuple[Floats, Floats]:
    """The plain and the moved bins that have pixels, each [N, 4]."""
    plain, moved = (boxes.reshape(-1, 4) for boxes in (entry.plain, entry.moved))
    has_pixels = (plain[:, 2:] > plain[:, :2]).all(1)
    return plain[has_pixels], moved[has_pixels]


def _describe(entry: RegionBins, window: Window) -> str:
    left, top, right, bottom = entry.region.box_xyxy
    text = f", {right - left}x{bottom - top} px"
    lengths = entry.lengths_px
    finite = lengths[np.isfinite(lengths)]
    text += f", mean offset {finite.mean():.3g} px" if len(finite) else ""
    if len(finite) < lengths.size:
        text += f", {lengths.size - len(finite)} not finite"
    _, moved = _select_bins(entry)
    is_finite = np.isfinite(moved).all(1)
    num_beyond = int((is_finite & ~is_within(window, _find_centers(moved))).sum())
    return text + (f", {num_beyond} beyond the margin" if num_beyond else "")


def _choose_window(entry: RegionBins) -> Window:
    """Return a square window around box and bins, the moved ones as far as the margin allows."""
    plain, moved = _select_bins(entry)
    still = np.concatenate([np.array([entry.region.box_xyxy], np.float64), plain])
    low, high = still[:, :2].min(0), still[:, 2:].max(0)
    reach = MAX_MARGIN_SHARE * (high - low).max()
    finite = moved[np.isfinite(moved).all(1)]
    if len(finite):
        outer_low, outer_high = finite[:, :2].min(0), finite[:, 2:].max(0)
        low, high = (
            np.maximum(np.minimum(low, outer_low), low - reach),
            np.minimum(np.maximum(high, outer_high), high + reach),
        )
    half = 0.54 * float((high - low).max()) + 1
    x, y = ((low + high) / 2 - 0.5).tolist()
    return x - half, y - half, x + half, y + half


def _find_edges(boxes: Floats) -> Floats:
    """The edges of boxes [N, 4], counted from the corner of the image, as segments [4N, 2, 2]."""
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] - 0.5  # [N, 4, 2]
    return np.stack([corners, np.roll(corners, -1, axis=1)], 2).reshape(-1, 2, 2)


def _find_centers(boxes: Floats) -> Floats:
    """Return the centers of boxes [N, 4], [N, 2], counted from the center of the first pixel."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5


def _count_columns(num_panels: int) -> int:
    return num_panels if num_panels <= 3 else 2 if num_panels == 4 else 4 if num_panels > 6 else 3
