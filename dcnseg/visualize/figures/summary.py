"""The summary of an image: prediction, effective dilation, offset flow and sampling points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dcnseg.data.class_map import IGNORE_INDEX, ClassMap
from dcnseg.inference.overlay import draw_overlay, present_classes
from dcnseg.visualize.charts import INK, PALETTE, shorten
from dcnseg.visualize.figures.drawing import (
    PADDING_NOTE,
    WHEEL_WIDTH,
    add_dilation_bar,
    add_flow_key,
    describe_dilation,
    find_dilation_limit,
    find_flow_scale,
    show_dilation,
    show_flow,
)
from dcnseg.visualize.figures.panels import (
    PANEL_STYLE,
    Rgb,
    capitalize,
    fade,
    find_class_color,
    find_window,
    make_sheet,
    show_image,
    tag,
)
from dcnseg.visualize.figures.point_drawing import draw_samples, mark_location, modulation_handles
from dcnseg.visualize.offsets import CASCADE_DEPTH, LayerOffsets, trace_cascade
from dcnseg.visualize.points import NamedPoint

MAX_POINTS: Final = 5  # drawn in one panel
LETTERS: Final = "ABCDE"
MAX_CLASSES: Final = 14  # in the legend
POINT_COLORS: Final = (PALETTE[4], PALETTE[1], "#f0e442", PALETTE[3], PALETTE[2])  # Okabe & Ito


@dataclass(frozen=True)
class NetworkView:
    """What a network does with one image.

    Attributes:
        name: Of the run.
        layers: Its deformable layers in forward order; may be empty.
        labels: Predicted training indices, uint8 [H, W]; 255 everywhere if the output of the
            network is not finite.
        class_map: The classes.
    """

    name: str
    layers: Sequence[LayerOffsets]
    labels: npt.NDArray[np.uint8]
    class_map: ClassMap


@matplotlib.rc_context(PANEL_STYLE)
def draw_summary(
    image: Rgb, views: Sequence[NetworkView], points: Sequence[NamedPoint], name: str
) -> Figure:
    """Draw the last deformable layer of a network, or of several side by side, on one sheet.

    Args:
        image: The image, uint8 RGB [H, W, 3].
        views: The networks; the first one has deformable layers.
        points: Points whose sampling points are drawn, evenly chosen if there are many.
        name: Of the image.
    """
    points = points[:: -(-len(points) // MAX_POINTS) or 1]
    last = [view.layers[-1] for view in views if view.layers]
    limit, scale = find_dilation_limit(last), find_flow_scale(last, image)
    # For several networks, each row shows one kind of panel; for one, they are in two rows.
    columns = max(2, len(views))
    keys = [WHEEL_WIDTH] * 2 if len(views) == 1 else [0.0] * (len(views) - 1) + [WHEEL_WIDTH]
    captions = [_make_captions(view, is_compared=len(views) > 1) for view in views]
    notes = [PADDING_NOTE]
    if points:
        named = (f"{letter} {point.title}" for letter, point in zip(LETTERS, points, strict=False))
        notes.insert(0, f"Points: {'; '.join(named)}.")
    names = " and ".join(shorten(view.name, 40) for view in views)
    title = f"{shorten(name, 60)}: what {names} {'sees' if len(views) == 1 else 'see'}"
    flat = [caption for row in zip(*captions, strict=True) for caption in row]
    windows = [find_window(image)] * len(flat)
    sheet = make_sheet(title, notes, flat, windows, columns, keys)
    for i, view in enumerate(views):
        prediction, *others = sheet.axes[i :: len(views)]
        _draw_prediction(prediction, image, view, points)
        if not view.layers:
            for axes in others:
                show_image(axes, fade(image), windows[0])
            continue
        heat = show_dilation(others[0], image, view.layers[-1], limit)
        arrows = show_flow(others[1], image, view.layers[-1], scale)
        _draw_cascades(others[2], image, view, points)
    of_kind = [len(views) * (kind + 1) - 1 for kind in range(4)]  # the last panel of each kind
    sheet.add_legend(of_kind[0], _make_class_handles(views))
    add_dilation_bar(sheet, of_kind[1], heat, last, limit)
    add_flow_key(sheet, of_kind[2], arrows, scale)
    if any(layer.mask is not None for view in views for layer in view.layers):
        sheet.add_legend(of_kind[3], modulation_handles())
    return sheet.figure


def _draw_prediction(
    axes: Axes, image: Rgb, view: NetworkView, points: Sequence[NamedPoint]
) -> None:
    """Draw the predicted classes over the image, and the points with their letters."""
    show_image(axes, draw_overlay(image, view.labels, view.class_map), find_window(image))
    for letter, color, point in zip(LETTERS, POINT_COLORS, points, strict=False):
        tag(axes, letter, point.xy, color)
        axes.plot(*point.xy, "o", color=color, markeredgecolor=INK, markersize=4)


def _draw_cascades(axes: Axes, image: Rgb, view: NetworkView, points: Sequence[NamedPoint]) -> None:
    """Draw the sampling points of several points in the color of each."""
    show_image(axes, fade(image), find_window(image))
    traced = [trace_cascade(view.layers[-CASCADE_DEPTH:], point.xy) for point in points]
    for color, samples in zip(POINT_COLORS, traced, strict=False):
        draw_samples(axes, samples, color, is_last=False)
    for letter, color, samples in zip(LETTERS, POINT_COLORS, traced, strict=False):
        mark_location(axes, samples.location_xy, color)
        tag(axes, letter, samples.location_xy, color)


def _make_captions(view: NetworkView, *, is_compared: bool) -> list[str]:
    depth = len(view.layers[-CASCADE_DEPTH:])
    is_known = (view.labels != IGNORE_INDEX).any()
    prediction = "prediction" if is_known else "no prediction: the output is not finite"
    captions = [prediction, *["no deformable layer"] * 3]
    if view.layers:
        captions[1:] = [
            f"effective dilation of {describe_dilation(view.layers[-1])}",
            f"mean offset of {view.layers[-1].title}",
            f"sampling points, cascade of the last {depth} layers",
        ]
    run = f"{shorten(view.name, 30)}: " if is_compared else ""
    return [f"{run}{text}" if run else capitalize(text) for text in captions]


def _make_class_handles(views: Sequence[NetworkView]) -> list[Patch]:
    entries: dict[tuple[str, str], None] = {}
    for view in views:
        for index in present_classes(view.labels, view.class_map.num_classes):
            if index in view.class_map.object_indices:
                name = shorten(view.class_map.names[index], 16)
                entries[name, find_class_color(view.class_map, index)] = None
    handles = [
        Patch(facecolor=color, edgecolor=INK, linewidth=0.6, label=name) for name, color in entries
    ]
    if len(handles) > MAX_CLASSES:
        rest = len(handles) - MAX_CLASSES
        handles[MAX_CLASSES:] = [Patch(fill=False, linewidth=0, label=f"and {rest} more")]
    return handles
