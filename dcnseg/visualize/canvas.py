"""Drawing primitives: a `Panel` to draw on in image coordinates, color bars, text, page layout.

Images are RGB arrays, uint8 [H, W, 3].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.lettering import INK, Color, text_width, write

Rgb = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Margins = tuple[int, int, int, int]  # left, top, right, bottom

FAINT_INK: Color = (105, 108, 118)
MISSING: Color = (255, 0, 255)  # color of NaN; in neither color map
SHORT_SIDE, LONG_SIDE = 640, 1280  # limits of a panel's longer side, in canvas pixels
GAP = 16

MIN_BAR_HEIGHT = 160
_SHIFT = 6  # fractional bits of cv2's integer coordinates
_MAX_COORDINATE = 30_000.0  # canvas pixels; cv2's fixed-point numbers overflow beyond it


@dataclass
class Panel:
    """An image, or a window of one, to draw on; resized by `scale_xy`, with margins.

    Methods take coordinates in image pixels (x, y), float64 [N, 2], where (0, 0) is the center of
    the upper left pixel; sizes and widths are in canvas pixels. NaN points are skipped.
    """

    canvas: Rgb
    scale_xy: tuple[float, float]
    margins: Margins = (0, 0, 0, 0)  # in canvas pixels
    corner_xy: tuple[int, int] = (0, 0)  # the window's upper left pixel in the image

    @classmethod
    def from_image(cls, image: Rgb, margins: Margins = (0, 0, 0, 0)) -> Panel:
        """Resize an image, with margins in image pixels, to a readable size."""
        height, width = image.shape[:2]
        longer = max(height, width)
        whole = max(height + margins[1] + margins[3], width + margins[0] + margins[2])
        scale = min(max(longer, SHORT_SIDE), LONG_SIDE) / longer
        scale = min(scale, max(LONG_SIDE / whole, SHORT_SIDE / longer))
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        scale_xy = (
            size[0] / width,
            size[1] / height,
        )  # differs from `scale` because sizes are integers
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        resized = cv2.resize(image, size, interpolation=way)
        if not any(margins):
            return cls(np.asarray(resized, np.uint8), scale_xy)
        left, top, right, bottom = (math.ceil(m * scale) for m in margins)
        canvas = _hatched(size[1] + top + bottom, size[0] + left + right)
        canvas[top : top + size[1], left : left + size[0]] = resized
        corners = (left - 1, top - 1), (left + size[0], top + size[1])
        cv2.rectangle(canvas, *corners, INK, 1)
        return cls(canvas, scale_xy, (left, top, right, bottom))

    @classmethod
    def from_window(cls, image: Rgb, window: tuple[int, int, int, int], side: int) -> Panel:
        """Resize a window of an image to a longer side of `side` canvas pixels.

        Args:
            image: RGB, uint8 [H, W, 3].
            window: Left, top, right and bottom in image pixels, the last two exclusive. It overlaps
                the image; the parts outside are hatched.
            side: In canvas pixels.
        """
        left, top, right, bottom = window
        height, width = image.shape[:2]
        scale = side / max(right - left, bottom - top)
        size = max(round((right - left) * scale), 1), max(round((bottom - top) * scale), 1)
        scale_xy = size[0] / (right - left), size[1] / (bottom - top)
        inside = image[max(top, 0) : bottom, max(left, 0) : right]
        rows = max(-top, 0), max(bottom - height, 0)
        columns = max(-left, 0), max(right - width, 0)
        padded = cv2.copyMakeBorder(inside, *rows, *columns, cv2.BORDER_REPLICATE)
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        panel = cls(
            np.asarray(cv2.resize(padded, size, interpolation=way), np.uint8),
            scale_xy,
            corner_xy=(left, top),
        )
        if any((*rows, *columns)):
            corners = np.array([[0, 0], [width, height]]) - 0.5
            edges = np.round(panel.place(corners) + 0.5).astype(int)
            (x, y), (x_end, y_end) = edges.tolist()
            part = slice(max(y, 0), max(y_end, 0)), slice(max(x, 0), max(x_end, 0))
            canvas = _hatched(size[1], size[0])
            canvas[part] = panel.canvas[part]
            cv2.rectangle(canvas, (x - 1, y - 1), (x_end, y_end), INK, 1)
            panel.canvas = canvas
        return panel

    def place(self, points_xy: Floats) -> Floats:
        """Convert image coordinates to canvas coordinates."""
        in_window = points_xy - np.array(self.corner_xy)
        placed: Floats = (in_window + 0.5) * np.array(self.scale_xy) - 0.5
        return placed + np.array(self.margins[:2], np.float64)

    def is_within(self, points_xy: Floats) -> npt.NDArray[np.bool_]:
        """Whether each point is on the canvas, including the margins; False for NaN."""
        size = np.array(self.canvas.shape[1::-1])
        placed = self.place(points_xy)
        return np.asarray(((placed >= -0.5) & (placed < size - 0.5)).all(-1))

    def dots(
        self,
        points_xy: Floats,
        radii: Floats | float,
        color: Color,
        outline: Color | None = None,
    ) -> None:
        """Draw filled circles."""
        radii = np.broadcast_to(np.asarray(radii, np.float64), len(points_xy))
        if outline is not None:
            self._blend(
                _disc_coverage(self.canvas.shape, self.place(points_xy), radii + 1), outline
            )
        self._blend(_disc_coverage(self.canvas.shape, self.place(points_xy), radii), color)

    def segments(self, starts_xy: Floats, ends_xy: Floats, color: Color, width: int = 1) -> None:
        """Draw straight lines."""
        for start, end in zip(self._fixed(starts_xy), self._fixed(ends_xy), strict=True):
            if start is not None and end is not None:
                cv2.line(self.canvas, start, end, color, width, cv2.LINE_AA, _SHIFT)

    def arrows(self, starts_xy: Floats, ends_xy: Floats, color: Color) -> None:
        """Draw arrows with a dark outline and heads of equal size."""
        starts, ends = self.place(starts_xy), self.place(ends_xy)
        drawable = _is_drawable(starts) & _is_drawable(ends)
        starts, ends = starts[drawable], ends[drawable]
        shaft = ends - starts
        length = np.linalg.norm(shaft, axis=1, keepdims=True)
        unit = np.divide(shaft, length, out=np.zeros_like(shaft), where=length > 0)
        head = np.minimum(9.0, 0.6 * length)
        sideways = unit[:, ::-1] * np.array([-1.0, 1.0])
        wings = [ends - head * unit + side * 0.5 * head * sideways for side in (-1, 1)]
        for ink, width in ((INK, 4), (color, 2)):
            for tail, tip in ((starts, ends), (wings[0], ends), (wings[1], ends)):
                for start, end in zip(_to_fixed(tail), _to_fixed(tip), strict=True):
                    if start is not None and end is not None:
                        cv2.line(self.canvas, start, end, ink, width, cv2.LINE_AA, _SHIFT)

    def square(self, point_xy: tuple[float, float], half_size: float, color: Color) -> None:
        """Draw a square around a point, with a dark outline."""
        center = self.place(np.array([point_xy]))
        corners = center + half_size * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        fixed = np.round(corners * (1 << _SHIFT)).astype(np.int32)
        for ink, width in ((INK, 5), (color, 3)):
            cv2.polylines(self.canvas, [fixed], True, ink, width, cv2.LINE_AA, _SHIFT)

    def _blend(self, coverage: Floats, color: Color) -> None:
        is_touched = coverage > 0
        share = coverage[is_touched][:, None]
        blended = self.canvas[is_touched] * (1 - share) + np.array(color) * share
        self.canvas[is_touched] = blended.round().astype(np.uint8)

    def _fixed(self, points_xy: Floats) -> list[tuple[int, int] | None]:
        return _to_fixed(self.place(points_xy))


def dim(rgb: Rgb) -> Rgb:
    """Convert to dark gray with full contrast, as a background for colored marks."""
    levels = 15 + 135 * _gray_levels(rgb)
    return levels[..., None].repeat(3, -1).astype(np.uint8)


def engrave(colors: Rgb, rgb: Rgb) -> Rgb:
    """Add the fine detail of an image to a heat map of the same size.

    The low frequencies are removed, so local mean colors still match the color bar.
    """
    gray = _gray_levels(rgb)
    smooth = cv2.GaussianBlur(gray, (0, 0), max(rgb.shape[:2]) / 40)
    detail = gray - np.asarray(smooth, np.float64)
    return np.clip(colors + 100 * detail[..., None], 0, 255).astype(np.uint8)


def _gray_levels(rgb: Rgb) -> Floats:
    """Convert to gray levels in [0, 1], with 0.01 of the pixels clipped at both ends."""
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float64)
    low, high = np.percentile(gray, (1, 99))
    return np.asarray(np.clip((gray - low) / max(high - low, 16.0), 0, 1))


def colorize(values: Floats, low: float, high: float, color_map: int) -> Rgb:
    """Map values in low..high to a color map of cv2, and NaN to magenta."""
    span = high - low if high > low else 1.0
    levels = np.clip((values - low) / span, 0, 1) * 255
    colored = cv2.applyColorMap(np.nan_to_num(levels).round().astype(np.uint8), color_map)
    rgb = np.array(colored[..., ::-1], np.uint8)
    rgb[np.isnan(values)] = MISSING
    return rgb


def color_bar(
    height: int, low: float, high: float, color_map: int, unit: str, mark: tuple[float, str] | None
) -> Rgb:
    """Draw a vertical color bar from `low` at the bottom to `high` at the top, with ticks.

    Args:
        height: Height in canvas pixels, at least MIN_BAR_HEIGHT.
        low: Value at the bottom.
        high: Value at the top, larger than `low`.
        color_map: A color map of cv2.
        unit: Unit, written above the bar.
        mark: A value to mark on the left, and its label. Outside of low..high, the label is at the
            nearer end, followed by "below" or "above".
    """
    height = max(height, MIN_BAR_HEIGHT)
    top, bottom, bar_width, label_size = 34, height - 12, 22, 15
    name, name_width = "", 0
    if mark is not None:
        place = "" if low <= mark[0] <= high else ", below" if mark[0] < low else ", above"
        name = mark[1] + place
        name_width = text_width(name, label_size) + 14
    left = 6 + name_width
    bar = np.full((height, left + bar_width + 70, 3), 255, np.uint8)
    ramp = np.linspace(high, low, bottom - top)[:, None].repeat(bar_width, 1)
    bar[top:bottom, left : left + bar_width] = colorize(ramp, low, high, color_map)
    cv2.rectangle(bar, (left - 1, top - 1), (left + bar_width, bottom), INK, 1)

    def row_of(value: float) -> int:
        return round(bottom - 1 - (value - low) / (high - low) * (bottom - 1 - top))

    right = left + bar_width
    for value in nice_ticks(low, high):
        row = row_of(value)
        cv2.line(bar, (right, row), (right + 6, row), INK, 1)
        write(bar, f"{value:g}", (right + 10, row - 9), label_size)
    write(bar, unit, (left, 6), label_size, FAINT_INK)
    if mark is not None and not math.isnan(mark[0]):
        row = row_of(min(max(mark[0], low), high))
        if low <= mark[0] <= high:
            cv2.line(bar, (left - 8, row), (right - 1, row), INK, 2)
        write(bar, name, (left - name_width, row - 9), label_size)
    return bar


def nice_ticks(low: float, high: float, max_count: int = 8) -> list[float]:
    """Return round numbers in low..high, spaced by 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max_count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def compose(
    panels: Sequence[tuple[str, Rgb]], columns: int, title: str, notes: Sequence[str]
) -> Rgb:
    """Arrange panels with captions in rows, below a title and lines of notes."""
    title_size, note_size, caption_size = 24, 16, 17
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    widths = [
        max(max(panel.shape[1], text_width(caption, caption_size)) for caption, panel in column)
        for column in (panels[start::columns] for start in range(min(columns, len(panels))))
    ]
    heights = [max(panel.shape[0] for _, panel in row) for row in rows]
    text_widths = [text_width(title, title_size), *(text_width(n, note_size) for n in notes)]
    width = max(sum(widths) + GAP * (len(widths) - 1), *text_widths) + 2 * GAP
    head = GAP + 36 + 24 * len(notes)
    height = head + sum(h + 30 + GAP for h in heights) + GAP // 2
    page = np.full((height, width, 3), 255, np.uint8)

    write(page, title, (GAP, GAP - 4), title_size)
    for index, note in enumerate(notes):
        write(page, note, (GAP, GAP + 32 + 24 * index), note_size, FAINT_INK)
    y = head
    for row, row_height in zip(rows, heights, strict=True):
        x = GAP
        for (caption, panel), column_width in zip(row, widths, strict=False):
            write(page, caption, (x, y + 4), caption_size)
            page[y + 30 : y + 30 + panel.shape[0], x : x + panel.shape[1]] = panel
            x += column_width + GAP
        y += row_height + 30 + GAP
    return page


def concatenate(left: Rgb, right: Rgb) -> Rgb:
    """Concatenate two images horizontally; the shorter one is padded with white."""
    height = max(left.shape[0], right.shape[0])
    filled = [
        np.pad(part, ((0, height - part.shape[0]), (0, 0), (0, 0)), constant_values=255)
        for part in (left, right)
    ]
    return np.concatenate(filled, axis=1)


def _hatched(height: int, width: int) -> Rgb:
    """Return a light gray area with diagonal lines, for the margins."""
    diagonal = np.add.outer(np.arange(height), np.arange(width)) % 12
    return np.where(diagonal[..., None] < 1, 205, 232).repeat(3, -1).astype(np.uint8)


def _disc_coverage(shape: tuple[int, ...], centers: Floats, radii: Floats) -> Floats:
    """Return the approximate share of every pixel that is covered by discs, with smooth edges.

    cv2.circle draws such small discs as diamonds.
    """
    coverage = np.zeros(shape[:2])
    is_near = _is_drawable(centers)
    centers, radii = centers[is_near], radii[is_near]
    if not len(centers):
        return coverage
    reach = math.ceil(radii.max() + 1)
    steps = np.arange(-reach, reach + 1)
    x = np.round(centers[:, 0]).astype(int)[:, None, None] + steps  # [N, 1, window]
    y = np.round(centers[:, 1]).astype(int)[:, None, None] + steps[:, None]  # [N, window, 1]
    distance = np.hypot(x - centers[:, 0, None, None], y - centers[:, 1, None, None])
    share = np.clip(radii[:, None, None] + 0.5 - distance, 0, 1)
    x, y = np.broadcast_arrays(x, y)
    is_on = (share > 0) & (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
    np.maximum.at(coverage, (y[is_on], x[is_on]), share[is_on])
    return coverage


def _is_drawable(placed: Floats) -> npt.NDArray[np.bool_]:
    """Whether each point is finite and in the range of cv2's coordinates."""
    return np.asarray((np.abs(placed) < _MAX_COORDINATE).all(-1))


def _to_fixed(placed: Floats) -> list[tuple[int, int] | None]:
    """Convert canvas coordinates to cv2's fixed-point numbers; None if not drawable."""
    is_drawable = _is_drawable(placed)
    fixed = np.round(np.where(is_drawable[:, None], placed, 0) * (1 << _SHIFT)).astype(int)
    return [
        (int(x), int(y)) if drawable else None
        for (x, y), drawable in zip(fixed, is_drawable, strict=True)
    ]
