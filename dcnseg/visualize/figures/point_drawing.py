"""Figures of the sampling points of single points, and an animation of a moving one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from dcnseg.files import atomic_path
from dcnseg.visualize.charts import DPI, INK, shorten
from dcnseg.visualize.figures.drawing import make_meshes
from dcnseg.visualize.figures.panels import (
    MOVED,
    PANEL_STYLE,
    PLAIN,
    Floats,
    Rgb,
    Window,
    capitalize,
    draw_dots,
    draw_lines,
    fade,
    find_window,
    is_within,
    make_sheet,
    show_image,
)
from dcnseg.visualize.offsets import (
    CASCADE_DEPTH,
    LayerOffsets,
    SamplingPoints,
    trace_cascade,
)
from dcnseg.visualize.points import NamedPoint, Point, TracedPoint, trace_point

LAST_DIAMETER: Final = 6.5  # points
CASCADE_DIAMETER: Final = 3.2
MANY_POINTS: Final = 100  # of which dots have thin outlines
MAX_COLUMNS: Final = 3
LEGEND_WIDTH: Final = 1.75
LOCATION: Final[dict[str, Any]] = {
    "marker": "s",
    "markersize": 7.5,
    "markerfacecolor": "none",
    "markeredgewidth": 2.0,
    "linestyle": "none",
}
FRAME_MS: Final = 90
ANIMATION_SIDE: Final = 5.0  # inches


@matplotlib.rc_context(PANEL_STYLE)
def draw_sampling_points(
    image: Rgb, layers: Sequence[LayerOffsets], point: NamedPoint, traced: TracedPoint
) -> Figure:
    """Draw the sampling points of one output location: last layer (top) and cascade (bottom).

    Points outside the image are drawn in a margin; those beyond it are counted in the caption.

    Args:
        image: The image, uint8 RGB [H, W, 3].
        layers: All deformable layers, in forward order.
        point: The point.
        traced: Its sampling points.
    """
    samples = (traced.last_plain, traced.last, traced.plain, traced.cascade)
    window = find_window(image, *(s.positions_xy.numpy() for s in samples))
    depth = len(layers[-CASCADE_DEPTH:])
    names = ("last layer", "last layer", f"cascade of {depth}", f"cascade of {depth}")
    captions = [
        f"{capitalize(name)}, {kind}: {count_points(each, window)}"
        for name, kind, each in zip(names, ("plain grid", "deformable") * 2, samples, strict=True)
    ]
    x, y = traced.last.location_xy
    notes = [
        f"Nearest output location: ({x:g}, {y:g}). Layers: "
        + ", ".join(layer.title for layer in layers[-CASCADE_DEPTH:])
        + "."
    ]
    title = f"Sampling points for {point.title}"
    keys = [0.0, LEGEND_WIDTH]
    sheet = make_sheet(title, notes, captions, [window] * 4, 2, keys)
    for i, (axes, each) in enumerate(zip(sheet.axes, samples, strict=True)):
        show_image(axes, fade(image), window)
        if i < 2:
            mesh = make_meshes(each.positions_xy.numpy(), layers[-1])
            draw_lines(axes, mesh, MOVED if i else PLAIN, 0.9)
        draw_samples(axes, each, MOVED if i % 2 else PLAIN, is_last=i < 2)
        mark_location(axes, each.location_xy)
    sheet.add_legend(1, _make_handles(has_modulation(samples)))
    return sheet.figure


@matplotlib.rc_context(PANEL_STYLE)
def draw_points(
    image: Rgb,
    networks: Sequence[tuple[str, Sequence[LayerOffsets]]],
    points: Sequence[NamedPoint],
) -> Figure:
    """Draw the sampling points of several points side by side, in each network.

    With up to three points, the first row of a network shows the last layer, and the second one the
    cascade; with more, there is only the cascade. Gray dots are those of the plain grid.

    Args:
        image: The image, uint8 RGB [H, W, 3].
        networks: The name of each network, and its deformable layers in forward order.
        points: The points.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", Figures 5 and 6.
    """
    columns = min(len(points), MAX_COLUMNS)
    kinds = (True, False) if len(points) <= MAX_COLUMNS else (False,)
    traced = [[trace_point(layers, point.xy) for point in points] for _, layers in networks]
    panels = [
        (name, layers, point, each, is_last)
        for is_last in kinds
        for (name, layers), row in zip(networks, traced, strict=True)
        for point, each in zip(points, row, strict=True)
    ]
    pairs = [(t.last_plain, t.last) if last else (t.plain, t.cascade) for *_, t, last in panels]
    window = find_window(image, *(s.positions_xy.numpy() for pair in pairs for s in pair))
    captions = []
    for (name, layers, point, _, is_last), (_, samples) in zip(panels, pairs, strict=True):
        what = "last layer" if is_last else f"cascade of {len(layers[-CASCADE_DEPTH:])}"
        run = f"{shorten(name, 30)}, " if len(networks) > 1 else ""
        text = f"{run}{what}: {count_points(samples, window)}"
        captions.append(f"{capitalize(point.title)}. {text if run else capitalize(text)}")
    notes = [
        f"{shorten(name, 40) + ': ' if len(networks) > 1 else ''}"
        + ", ".join(layer.title for layer in layers[-CASCADE_DEPTH:])
        for name, layers in networks
    ]
    notes[0] = f"Layers: {notes[0]}"
    keys = [0.0] * (columns - 1) + [LEGEND_WIDTH]
    side = 3.6 if columns == MAX_COLUMNS else 4.0
    windows = [window] * len(panels)
    title = "Sampling points of deformable convolutions"
    sheet = make_sheet(title, notes, captions, windows, columns, keys, side)
    for axes, (_, layers, _, _, is_last), (plain, samples) in zip(
        sheet.axes, panels, pairs, strict=True
    ):
        show_image(axes, fade(image), window)
        for each, color in ((plain, PLAIN), (samples, MOVED)):
            if is_last:
                draw_lines(axes, make_meshes(each.positions_xy.numpy(), layers[-1]), color, 0.9)
            draw_samples(axes, each, color, is_last=is_last)
        mark_location(axes, samples.location_xy)
    everything = [samples for _, samples in pairs]
    sheet.add_legend(columns - 1, _make_handles(has_modulation(everything)))
    return sheet.figure


def draw_samples(axes: Axes, samples: SamplingPoints, color: str, *, is_last: bool) -> None:
    """Draw sampling points as dots whose areas are proportional to the modulation."""
    positions = samples.positions_xy.numpy()
    diameter = LAST_DIAMETER if is_last else CASCADE_DIAMETER
    diameter *= min(1.0, (1000 / len(positions)) ** 0.25)
    width = 0.7 if len(positions) <= MANY_POINTS else 0.25
    edge = INK if color == PLAIN or len(positions) > MANY_POINTS else "white"
    draw_dots(axes, positions, diameter * _weigh(samples), color, edge=edge, edge_width=width)


def mark_location(axes: Axes, location_xy: Point, color: str = "white") -> None:
    """Draw a square around an output location."""
    for ink, extra in ((INK, 2.0), (color, 0.0)):
        style = {**LOCATION, "markeredgewidth": LOCATION["markeredgewidth"] + extra}
        axes.plot(*location_xy, markeredgecolor=ink, zorder=5, **style)


def count_points(samples: SamplingPoints, window: Window) -> str:
    """Describe the number of sampling points, and of those that a panel does not show."""
    positions = samples.positions_xy.numpy()
    is_finite = np.isfinite(positions).all(1)
    num_outside = int((is_finite & ~is_within(window, positions)).sum())
    text = f"{len(positions)} points"
    num_distinct = len(np.unique(np.round(positions, 3), axis=0))
    if num_outside:
        text = f"{num_outside} of {text} lie outside the drawing"
    elif num_distinct < len(positions):
        text += f" at {num_distinct} positions"
    if not is_finite.all():
        text += f", {int((~is_finite).sum())} not finite"
    return text


def has_modulation(samples: Sequence[SamplingPoints]) -> bool:
    """Whether any sampling point has a weight."""
    return any(bool((each.weights != 1).any()) for each in samples)


def modulation_handles() -> list[Line2D]:
    """Return legend entries for the areas of dots."""
    return [
        _make_handle(f"modulation {weight:g}", MOVED, 1.5 * CASCADE_DIAMETER * weight**0.5)
        for weight in (0.25, 1.0, 2.0)
    ]


@matplotlib.rc_context(PANEL_STYLE)
def write_animation(image: Rgb, layers: Sequence[LayerOffsets], frames: int, path: Path) -> None:
    """Write an animated WebP: the sampling points of a point that moves over the image.

    The point follows a closed curve. The plain grid is gray.
    """
    depth = len(layers[-CASCADE_DEPTH:])
    curve = _make_curve(image, frames)
    window = find_window(image, *(_trace(layers, xy).positions_xy.numpy() for xy in curve))
    caption = f"Deformable (orange) and plain (gray), cascade of {depth}"
    sheet = make_sheet("Sampling points", [], [caption], [window], 1, side=ANIMATION_SIDE)
    axes = sheet.axes[0]
    show_image(axes, fade(image), window)
    canvas: Any = FigureCanvasAgg(sheet.figure)  # has no types
    sheet.figure.set_dpi(DPI)
    canvas.draw()
    background = canvas.copy_from_bbox(sheet.figure.bbox)
    pictures = []
    for xy in curve:
        before = set(axes.get_children())
        for is_plain, color in ((True, PLAIN), (False, MOVED)):
            samples = _trace(layers, xy, is_plain=is_plain)
            draw_samples(axes, samples, color, is_last=False)
        mark_location(axes, samples.location_xy)
        canvas.restore_region(background)
        drawn = [artist for artist in axes.get_children() if artist not in before]
        for artist in sorted(drawn, key=lambda artist: artist.get_zorder()):
            axes.draw_artist(artist)
            artist.remove()
        rgba = np.asarray(canvas.buffer_rgba())
        pictures.append(Image.fromarray(rgba[..., :3].copy()))
    with atomic_path(path, is_durable=False) as temporary:
        pictures[0].save(
            temporary,
            save_all=True,
            append_images=pictures[1:],
            duration=FRAME_MS,
            loop=0,
            quality=75,
        )


def _make_curve(image: Rgb, count: int) -> list[Point]:
    """Return points on a closed figure eight over an image."""
    height, width = image.shape[:2]
    turns = 2 * np.pi * np.arange(count) / count
    x = (width - 1) * (0.5 + 0.4 * np.cos(turns))
    y = (height - 1) * (0.5 + 0.35 * np.sin(2 * turns))
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]


def _trace(layers: Sequence[LayerOffsets], xy: Point, *, is_plain: bool = False) -> SamplingPoints:
    return trace_cascade(layers[-CASCADE_DEPTH:], xy, is_plain=is_plain)


def _weigh(samples: SamplingPoints) -> Floats:
    """The factor of each dot's diameter: the root of its weight, with a visible minimum."""
    weights = np.nan_to_num(samples.weights.double().numpy())
    return np.asarray(np.sqrt(np.clip(weights, 0.08, 4.0)))


def _make_handle(label: str, color: str, diameter: float) -> Line2D:
    edge = INK if color == PLAIN else "white"
    return Line2D(
        [], [], marker="o", linestyle="none", label=label, color=color, markersize=diameter,
        markeredgecolor=edge, markeredgewidth=0.6,
    )  # fmt: skip


def _make_handles(is_modulated: bool) -> list[Line2D]:
    location = Line2D([], [], markeredgecolor=INK, label="output location", **LOCATION)
    handles = [
        _make_handle("deformable", MOVED, LAST_DIAMETER),
        _make_handle("plain grid", PLAIN, LAST_DIAMETER),
        location,
    ]
    return handles + (modulation_handles() if is_modulated else [])
