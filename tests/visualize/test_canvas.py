from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from dcnseg.lettering import INK, text_width
from dcnseg.visualize.canvas import (
    MISSING,
    Panel,
    Rgb,
    color_bar,
    colorize,
    compose,
    dim,
    engrave,
    nice_ticks,
)


def blank(height: int, width: int, value: int = 0) -> Rgb:
    return np.full((height, width, 3), value, np.uint8)


def centroid(weights: npt.NDArray[np.float64]) -> tuple[float, float]:
    y, x = np.indices(weights.shape)
    total = weights.sum(dtype=np.float64)
    return float((x * weights).sum() / total), float((y * weights).sum() / total)


@pytest.mark.parametrize("size_hw", [(48, 64), (33, 50), (900, 1300), (2000, 3001)])
@pytest.mark.parametrize("margins", [(0, 0, 0, 0), (5, 9, 2, 3)])
def test_dots_match_the_image(size_hw: tuple[int, int], margins: tuple[int, int, int, int]) -> None:
    image = blank(*size_hw)
    x, y = size_hw[1] // 3, size_hw[0] // 2
    half = max(size_hw) // 100  # a single pixel would vanish when downscaled
    image[y - half : y + half + 1, x - half : x + half + 1] = (0, 255, 0)
    panel = Panel.from_image(image, margins)
    left, top = panel.margins[:2]
    inner = panel.canvas.copy()
    inner[:top], inner[:, :left] = 0, 0
    inner[top + round(size_hw[0] * panel.scale_xy[1]) :] = 0
    inner[:, left + round(size_hw[1] * panel.scale_xy[0]) :] = 0
    in_image = centroid(inner[..., 1].astype(np.float64))

    marked = Panel(np.zeros_like(panel.canvas), panel.scale_xy, panel.margins)
    marked.dots(np.array([[x, y]], np.float64), 4.0, (255, 0, 0))

    dot = centroid(marked.canvas[..., 0].astype(np.float64))
    assert dot == pytest.approx(in_image, abs=0.15)


@pytest.mark.parametrize("size_hw", [(48, 64), (900, 1300)])
@pytest.mark.parametrize("shift", [(-3, 0), (0, 0), (4, 2)])  # in tenths of the sides
def test_dots_match_the_window(size_hw: tuple[int, int], shift: tuple[int, int]) -> None:
    height, width = size_hw
    left, top = shift[0] * width // 10, shift[1] * height // 10
    window = left, top, left + width * 4 // 5, top + height
    image = blank(height, width)
    x, y = width * 9 // 20, height // 2
    half = max(size_hw) // 100
    image[y - half : y + half + 1, x - half : x + half + 1] = (0, 255, 0)
    panel = Panel.from_window(image, window, 400)
    assert max(panel.canvas.shape) == 400

    place = panel.place(np.array([[-0.5, -0.5], [width - 0.5, height - 0.5]])) + 0.5
    (x_start, y_start), (x_end, y_end) = np.rint(place).astype(int).clip(min=0).tolist()
    is_inside = np.zeros(panel.canvas.shape[:2], bool)
    is_inside[y_start:y_end, x_start:x_end] = True
    assert (panel.canvas[is_inside][:, [0, 2]] == 0).all()
    is_far = cv2.erode((~is_inside).view(np.uint8), np.ones((3, 3), np.uint8)).view(bool)
    assert (panel.canvas[is_far] > 150).all()  # hatched
    assert is_far.any() == any(shift)

    in_window = centroid(np.where(is_inside, panel.canvas[..., 1], 0).astype(np.float64))
    marked = Panel(np.zeros_like(panel.canvas), panel.scale_xy, corner_xy=panel.corner_xy)
    marked.dots(np.array([[x, y]], np.float64), 4.0, (255, 0, 0))
    dot = centroid(marked.canvas[..., 0].astype(np.float64))
    assert dot == pytest.approx(in_window, abs=0.15)


def test_lines_dots_and_squares_have_the_same_center() -> None:
    point = np.array([[20.3, 15.8]])
    panels = [Panel(blank(40, 50), (1.0, 1.0)) for _ in range(3)]
    panels[0].dots(point, 5.0, (255, 0, 0))
    panels[1].segments(point - 6, point + 6, (255, 0, 0))
    panels[2].square((20.3, 15.8), 6.0, (255, 0, 0))
    for panel in panels:
        found = centroid(panel.canvas[..., 0].astype(np.float64))
        assert found == pytest.approx((20.3, 15.8), abs=0.12)


def test_panel_sizes() -> None:
    assert Panel.from_image(blank(48, 64)).canvas.shape == (480, 640, 3)
    assert Panel.from_image(blank(3000, 1500)).canvas.shape == (1280, 640, 3)
    assert Panel.from_image(blank(700, 800)).canvas.shape == (700, 800, 3)
    assert Panel.from_image(blank(1, 900)).canvas.shape == (1, 900, 3)


def test_margins_are_hatched_and_have_an_edge() -> None:
    panel = Panel.from_image(blank(640, 640, 255), (10, 20, 30, 40))
    assert panel.canvas.shape == (700, 680, 3)
    assert (panel.canvas[20:660, 10:650] == 255).all()
    assert (panel.canvas[19, 9:651] == INK).all()
    assert (panel.canvas[660, 9:651] == INK).all()
    assert panel.canvas[:19].max() <= 232


def test_far_and_nan_points_are_skipped() -> None:
    panel = Panel(blank(40, 50), (1.0, 1.0))
    points = np.array([[np.nan, 3.0], [np.inf, 0.0], [1e12, -1e12], [-500.0, 20.0]])
    panel.dots(points, 4.0, (255, 0, 0), (0, 255, 0))
    panel.segments(points, points[::-1], (255, 0, 0))
    assert not panel.canvas.any()
    panel.arrows(points, points + 1, (255, 0, 0))
    assert not panel.is_within(points).any()
    near = np.array([[0.0, 0.0], [49.4, 39.4], [49.6, 0.0]])
    assert panel.is_within(near).tolist() == [True, True, False]


def test_colorize() -> None:
    found = colorize(np.array([[0.0, 5.0, 10.0, 99.0, np.nan]]), 0, 10, cv2.COLORMAP_VIRIDIS)
    assert tuple(found[0, 4]) == MISSING
    assert (found[0, 2] == found[0, 3]).all()
    assert found[0, 0].tolist() == [68, 1, 84]  # both ends of viridis
    assert found[0, 2].tolist() == [253, 231, 37]


def test_color_bar_has_the_high_values_at_the_top() -> None:
    bar = color_bar(300, 10, 60, cv2.COLORMAP_VIRIDIS, "px", None)
    column = bar[:, 10]
    rows = [
        int(np.abs(column.astype(int) - end).sum(1).argmin())
        for end in ([68, 1, 84], [253, 231, 37])
    ]
    assert rows[0] > 280
    assert rows[1] < 40


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (31.7, 32.3, [31.7, 31.8, 31.9, 32, 32.1, 32.2, 32.3]),
        (-3, 71, [0, 10, 20, 30, 40, 50, 60, 70]),
    ],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == ticks


def test_compose_shows_every_panel_unchanged() -> None:
    panels = [("a", blank(60, 80, 10)), ("b", blank(40, 50, 20)), ("c", blank(30, 70, 30))]
    page = compose(panels, 2, "title", ["one note", "another"])
    for value, (_, panel) in zip((10, 20, 30), panels, strict=True):
        rows, columns = np.nonzero((page == value).all(-1))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == panel.shape[:2]
    assert (page[:, :8] == 255).all()


def test_compose_widens_the_page_for_long_text() -> None:
    note = "a note that is much longer than the panel is wide " * 3
    page = compose([("a", blank(20, 20))], 1, "title", [note])
    assert page.shape[1] > text_width(note, 16)
    assert (page[:, -8:] == 255).all()


def test_dim_keeps_the_contrast_of_a_dark_image() -> None:
    image = blank(20, 20, 5)
    image[:, 10:] = 40
    found = dim(image).astype(int)
    assert found[0, 15, 0] - found[0, 5, 0] > 100
    assert found.max() <= 150


def test_engrave_keeps_colors_on_a_uniform_image() -> None:
    colors = colorize(np.linspace(0, 1, 80)[None].repeat(60, 0), 0, 1, cv2.COLORMAP_INFERNO)
    assert (engrave(colors, blank(60, 80, 90)) == colors).all()
