"""Sheets of image panels, drawn with Matplotlib: layout, images, heat maps, dots and lines.

The data coordinates of a panel are image pixels (x, y); (0, 0) is the center of the upper left
pixel. Lengths on the sheet are in inches.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dcnseg.data.class_map import ClassMap
from dcnseg.inference.overlay import overlay_colors
from dcnseg.visualize.charts import INK, PALETTE, STYLE
from dcnseg.visualize.geometry import MapGeometry

Rgb = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Window = tuple[float, float, float, float]  # left, top, right and bottom edges in image pixels

MOVED: Final = PALETTE[1]  # of what the offsets moved
PLAIN: Final = "#c8cdd7"  # of plain grids
FAINT_INK: Final = "#5d606a"
MISSING: Final = "#6b6e76"  # of values that are not finite
SIDE: Final = 4.0  # longer side of a panel
MARGIN_SHARE: Final = 0.15  # largest margin around the image, of its longer side
GAP: Final = 0.2
TICK_SPACE: Final = 0.3  # for the labels of the y axis
MIN_COLUMN: Final = 2.4  # width, for captions of narrow panels
TITLE_SIZE, CAPTION_SIZE, NOTE_SIZE, TICK_SIZE = 14.0, 10.0, 9.0, 7.5  # points
LINE_HEIGHT: Final = 1.35  # of the font size
CHARACTER_WIDTH: Final = 0.6  # of the font size, on average
FAR: Final = 20.0  # sides of the panel beyond which nothing is drawn
MAX_IMAGE_SIDE: Final = 1600  # pixels; larger images are reduced
PANEL_STYLE: Final[Any] = {
    **STYLE,
    "axes.edgecolor": FAINT_INK,
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "axes.spines.right": True,
    "axes.spines.top": True,
    "axes.titlesize": CAPTION_SIZE,
    "hatch.linewidth": 0.6,
    "legend.fontsize": NOTE_SIZE,
}


@dataclass(frozen=True)
class Sheet:
    """A figure of panels in rows, below a title and notes.

    Attributes:
        figure: The figure.
        axes: The panels, row by row.
        corners: Right and top edge of each panel, from the upper left corner of the sheet.
    """

    figure: Figure
    axes: list[Axes]
    corners: list[tuple[float, float]]

    def add_key(
        self, panel: int, width: float, height: float, *, right: float = 0.15, down: float = 0.0
    ) -> Axes:
        """Add axes for a legend or a color bar, at a distance from a panel's upper right corner."""
        x, y = self.corners[panel][0] + right, self.corners[panel][1] + down
        return self.figure.add_axes(_to_box(x, y, width, height, self.figure))

    def add_legend(self, panel: int, handles: Sequence[Any], *, down: float = 0.0) -> None:
        """Add a legend beside a panel."""
        axes = self.add_key(panel, 0.1, 0.1, down=down)
        axes.set_axis_off()
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 1)}
        axes.legend(handles=handles, borderaxespad=0, borderpad=0, handletextpad=0.6, **place)


def make_sheet(
    title: str,
    notes: Sequence[str],
    captions: Sequence[str],
    windows: Sequence[Window],
    columns: int,
    key_widths: Sequence[float] = (),
    side: float = SIDE,
) -> Sheet:
    """Make a figure with a panel for each caption, and wrap the texts to its width.

    Args:
        title: The title.
        notes: Paragraphs below the title.
        captions: A caption for each panel.
        windows: The part of the image that each panel shows.
        columns: Number of panels in a row.
        key_widths: Space to the right of each column, for legends.
        side: The longer side of a panel.
    """
    columns = min(columns, len(captions))
    sizes = []
    for left, top, right, bottom in windows:
        scale = side / max(right - left, bottom - top)
        sizes.append(((right - left) * scale, (bottom - top) * scale))
    cell = max(MIN_COLUMN, *(width for width, _ in sizes))
    keys = [*key_widths, *[0.0] * columns][:columns]
    has_same_window = len(set(windows)) == 1
    gap = GAP if has_same_window else GAP + TICK_SPACE
    width = sum(keys) + columns * cell + (columns - 1) * gap + 2 * GAP + TICK_SPACE
    y = GAP + 0.1
    texts = []
    for text, font_size, color in (
        (title, TITLE_SIZE, INK),
        *((n, NOTE_SIZE, FAINT_INK) for n in notes),
    ):
        for line in _wrap(text, width - 2 * GAP, font_size):
            texts.append((y, line, font_size, color))
            y += font_size / 72 * LINE_HEIGHT
        y += 0.08 if text == title else 0.0
    places = []  # left, top, lines of the caption
    for start in range(0, len(captions), columns):
        row = range(start, min(start + columns, len(captions)))
        lines = [_wrap(captions[i], cell + 0.9 * keys[i - start], CAPTION_SIZE) for i in row]
        y += GAP + max(map(len, lines)) * CAPTION_SIZE / 72 * LINE_HEIGHT
        x = GAP + TICK_SPACE
        for i in row:
            places.append((x, y, "\n".join(lines[i - start])))
            x += cell + keys[i - start] + gap
        y += max(sizes[i][1] for i in row) + (0.08 if has_same_window else 0.18)
    figure = Figure(figsize=(width, y + GAP + 0.12))
    for top_of_text, line, font_size, color in texts:
        place = GAP / width, 1 - top_of_text / figure.get_figheight()
        figure.text(*place, line, size=font_size, color=color, va="top")
    axes = []
    for i, ((x, y, caption), size) in enumerate(zip(places, sizes, strict=True)):
        panel = figure.add_axes(_to_box(x, y, *size, figure))
        panel.set_title(caption, loc="left", pad=4, linespacing=LINE_HEIGHT - 0.1)
        panel.tick_params(
            labelsize=TICK_SIZE,
            length=2,
            color=FAINT_INK,
            labelcolor=FAINT_INK,
            labelleft=i % columns == 0 or not has_same_window,
            labelbottom=i + columns >= len(captions) or not has_same_window,
        )
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.append(panel)
    corners = [(x + size[0], y) for (x, y, _), size in zip(places, sizes, strict=True)]
    return Sheet(figure, axes, corners)


def find_window(image: Rgb, *positions_xy: Floats) -> Window:
    """Return the window of an image, with a margin for positions [N, 2] outside.

    The margin is at most `MARGIN_SHARE` of the image's longer side.
    """
    height, width = image.shape[:2]
    low, high = np.full(2, -0.5), np.array([width, height]) - 0.5
    positions = np.concatenate([np.empty((0, 2)), *positions_xy])
    finite = positions[np.isfinite(positions).all(1)]
    if len(finite):
        pad, largest = 0.02 * max(height, width), MARGIN_SHARE * max(height, width)
        excess_low = low - finite.min(0)
        excess_high = finite.max(0) - high
        low = low - np.where(excess_low > 0, np.minimum(excess_low + pad, largest), 0)
        high = high + np.where(excess_high > 0, np.minimum(excess_high + pad, largest), 0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def is_within(window: Window, points_xy: Floats) -> npt.NDArray[np.bool_]:
    """Whether each point [N, 2] is in a window; False for NaN."""
    inside = (points_xy >= np.array(window[:2])) & (points_xy <= np.array(window[2:]))
    return np.asarray(inside.all(-1))


def show_image(axes: Axes, image: Rgb, window: Window) -> None:
    """Show the part of an image in a window; outside the image, the window is hatched."""
    height, width = image.shape[:2]
    left, top, right, bottom = window
    if window != find_window(image):
        outer = Rectangle((left, top), right - left, bottom - top, zorder=-3, linewidth=0)
        outer.set(facecolor="#ececef", edgecolor="#bfc2c9", hatch="////")
        axes.add_patch(outer)
        edge = Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=INK, linewidth=0.8)
        axes.add_patch(edge)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(_reduce(image), extent=extent, interpolation="hanning", zorder=-2)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def show_map(
    axes: Axes,
    image: Rgb,
    values: Floats,
    geometry: MapGeometry,
    color_map: Colormap | None = None,
    norm: Normalize | None = None,
) -> AxesImage:
    """Show values [Ho, Wo] or colors [Ho, Wo, 3] over a whole image, with its fine detail.

    They are interpolated between the output locations, and constant beyond the outer ones. The
    detail has no low frequencies, so local mean colors still match the color bar.
    """
    pads, edges = [], []
    for axis, size in enumerate(image.shape[:2]):
        stride, origin = geometry.stride_px[axis], geometry.origin_px[axis]
        count = values.shape[axis]
        before = max(0, int(np.ceil((origin + 0.5) / stride)))
        after = max(0, int(np.ceil((size - 0.5 - origin) / stride)) - count + 1)
        pads.append((before, after))
        edges.append((origin - (before + 0.5) * stride, origin + (count + after - 0.5) * stride))
    padded = np.pad(values, [*pads, (0, 0)][: values.ndim], mode="edge")
    (top, bottom), (left, right) = edges
    show_image(axes, image, find_window(image))
    drawn = axes.imshow(
        np.ma.masked_invalid(padded) if values.ndim == 2 else padded,
        cmap=color_map,
        norm=norm,
        extent=(left, right, bottom, top),
        interpolation="bilinear",
        interpolation_stage="data" if values.ndim == 2 else None,
        zorder=-1.5,
    )
    height, width = image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(_find_detail(_reduce(image)), extent=extent, interpolation="hanning", zorder=-1)
    return drawn


def draw_dots(
    axes: Axes,
    points_xy: Floats,
    diameters: Floats | float,
    color: str,
    *,
    edge: str = "white",
    edge_width: float = 0.6,
    zorder: float = 4.0,
) -> None:
    """Draw the dots within the window of a panel; diameters are in points."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    inside = is_within((left, top, right, bottom), points_xy)
    sizes = np.broadcast_to(np.square(diameters), len(points_xy))[inside]
    edges: dict[str, Any] = {"edgecolors": edge, "linewidths": edge_width}
    x, y = points_xy[inside].T
    axes.scatter(x, y, s=sizes, color=color, zorder=zorder, **edges)


def draw_lines(
    axes: Axes,
    segments: Floats,
    color: str,
    width: float,
    *,
    outline: str = INK,
    style: str = "solid",
) -> None:
    """Draw segments [N, 2, 2] with an outline; those that are far away or NaN are skipped."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    reach = FAR * max(right - left, bottom - top)
    near = segments[(np.abs(segments) < reach).all((1, 2))]
    lines = LineCollection(list(near), colors=color, linewidths=width, linestyles=style, zorder=3)
    lines.set_path_effects([patheffects.withStroke(linewidth=width + 1.2, foreground=outline)])
    axes.add_collection(lines, autolim=False)


def tag(axes: Axes, text: str, point_xy: tuple[float, float], color: str) -> None:
    """Write a short text on a colored tag beside a point, inside the panel."""
    right, bottom = max(axes.get_xlim()), max(axes.get_ylim())
    shift = -9 if point_xy[0] > 0.93 * right else 9, -9 if point_xy[1] < 0.07 * bottom else 9
    axes.annotate(
        text,
        point_xy,
        shift,
        textcoords="offset points",
        ha="center",
        va="center",
        size=8.5,
        weight="bold",
        color="white" if sum(to_rgb(color)) < 1.6 else INK,
        bbox={"boxstyle": "round,pad=0.2", "fc": color, "ec": "white", "lw": 0.8},
        zorder=6,
    )


def find_class_color(class_map: ClassMap, index: int) -> str:
    """Return the color of a class in overlays."""
    red, green, blue = (overlay_colors(class_map)[index] / 255.0).tolist()
    return to_hex((red, green, blue))


def dim(rgb: Rgb) -> Rgb:
    """Convert to dark gray with full contrast, as a background for colored marks."""
    levels = 15 + 135 * _gray_levels(rgb)
    return levels[..., None].repeat(3, -1).astype(np.uint8)


def fade(rgb: Rgb, share: float = 0.45) -> Rgb:
    """Mix the colors of an image with gray."""
    gray = np.repeat(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    return np.rint((1 - share) * rgb + share * gray).astype(np.uint8)


def capitalize(text: str) -> str:
    """Return a text with a capital first letter."""
    return text[:1].upper() + text[1:]


def nice_above(value: float) -> float:
    """Return the smallest 1, 2 or 5 times a power of ten that is not below a positive value."""
    magnitude = 10.0 ** np.floor(np.log10(value))
    return float(next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= value * 0.999))


def _wrap(text: str, width: float, size: float) -> list[str]:
    return textwrap.wrap(text, max(int(72 * width / (CHARACTER_WIDTH * size)), 20)) or [""]


def _to_box(
    x: float, y: float, width: float, height: float, figure: Figure
) -> tuple[float, float, float, float]:
    """Convert inches from the upper left corner to a box of Matplotlib."""
    whole_width, whole_height = figure.get_size_inches().tolist()
    bottom = 1 - (y + height) / whole_height
    return x / whole_width, bottom, width / whole_width, height / whole_height


def _reduce(image: Rgb) -> Rgb:
    height, width = image.shape[:2]
    scale = MAX_IMAGE_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _find_detail(rgb: Rgb) -> Rgb:
    """Return black and white with the opacity of an image's fine detail, uint8 [H, W, 4]."""
    gray = _gray_levels(rgb)
    smooth = cv2.GaussianBlur(gray, (0, 0), max(max(rgb.shape[:2]) / 40, 0.5))
    detail = gray - np.asarray(smooth, np.float64)
    layer = np.zeros((*gray.shape, 4), np.uint8)
    layer[..., :3] = np.where(detail > 0, 255, 0)[..., None]
    layer[..., 3] = np.clip(180 * np.abs(detail), 0, 150)
    return layer


def _gray_levels(rgb: Rgb) -> Floats:
    """Convert to gray levels in [0, 1], with 0.01 of the pixels clipped at both ends."""
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float64)
    low, high = np.percentile(gray, (1, 99))
    return np.asarray(np.clip((gray - low) / max(high - low, 16.0), 0, 1))
