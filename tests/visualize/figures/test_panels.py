from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.text import Text

from dcnseg.visualize.charts import DPI, chart_to_rgb, save_chart
from dcnseg.visualize.figures.panels import (
    Rgb,
    Sheet,
    dim,
    draw_dots,
    draw_lines,
    fade,
    find_window,
    is_within,
    make_sheet,
    nice_above,
    show_image,
    show_map,
)
from dcnseg.visualize.geometry import MapGeometry

GRAYS = matplotlib.colormaps["gray"].with_extremes(bad="#ff00ff")


def blank(height: int, width: int, value: int = 0) -> Rgb:
    return np.full((height, width, 3), value, np.uint8)


def centroid(weights: npt.NDArray[np.float64]) -> tuple[float, float]:
    y, x = np.indices(weights.shape)
    total = weights.sum(dtype=np.float64)
    return float((x * weights).sum() / total), float((y * weights).sum() / total)


def place(axes: Axes, x: float, y: float, height: int) -> tuple[int, int]:
    """The row and column of a point in the drawn figure."""
    figure = axes.get_figure()
    assert figure is not None
    column, row = axes.transData.transform((x, y)) * DPI / figure.dpi
    return round(height - row - 0.5), round(column - 0.5)


def sheet_of(image: Rgb, *points: tuple[float, float]) -> Sheet:
    window = find_window(image, np.array(points).reshape(-1, 2))
    sheet = make_sheet("", [], [""], [window], 1)
    show_image(sheet.axes[0], image, window)
    return sheet


@pytest.mark.parametrize("size_hw", [(48, 64), (900, 1300), (1500, 2003)])
@pytest.mark.parametrize("point", [(5.0, 5.0), (-300.0, 40.0)])  # the latter widens the window
def test_dots_match_the_image(size_hw: tuple[int, int], point: tuple[float, float]) -> None:
    image = blank(*size_hw)
    x, y = size_hw[1] // 3, size_hw[0] // 2
    half = max(size_hw) // 100  # a single pixel would vanish when downscaled
    image[y - half : y + half + 1, x - half : x + half + 1] = (0, 255, 0)
    drawn = chart_to_rgb(sheet_of(image, point).figure).astype(np.float64)
    green = (drawn[..., 1] - drawn[..., 0] - 40).clip(0)  # texts are not quite gray

    sheet = sheet_of(blank(*size_hw), point)
    draw_dots(sheet.axes[0], np.array([[x, y]], np.float64), 6.0, "#ff0000", edge="#ff0000")
    drawn = chart_to_rgb(sheet.figure).astype(np.float64)
    red = (drawn[..., 0] - drawn[..., 1] - 40).clip(0)
    assert centroid(red) == pytest.approx(centroid(green), abs=1.1)
    row, column = place(sheet.axes[0], x, y, len(drawn))
    assert red[row, column] == 215


def test_the_window_reaches_for_points_outside() -> None:
    image = blank(100, 200)
    whole = (-0.5, -0.5, 199.5, 99.5)
    assert find_window(image) == whole
    assert find_window(image, np.array([[0.0, 99.4], [np.nan, 3]])) == whole
    left, top, right, bottom = find_window(image, np.array([[-10.5, 40]]), np.array([[1e9, 50]]))
    assert (left, right) == pytest.approx((-0.5 - 10 - 4, 199.5 + 30))
    assert (top, bottom) == whole[1::2]


def test_outside_of_the_image_is_hatched() -> None:
    sheet = sheet_of(blank(50, 50), (-20.0, 20.0))
    drawn = chart_to_rgb(sheet.figure)
    row, edge = place(sheet.axes[0], -0.5, 25, len(drawn))
    assert drawn[row - 20 : row + 20, edge - 40 : edge - 3].min() > 150
    assert drawn[row - 20 : row + 20, edge + 3 : edge + 40].max() == 0


def test_maps_are_interpolated_between_locations() -> None:
    values = np.zeros((4, 6))
    values[:, 3:] = 1.0
    image = blank(64, 96, 90)
    sheet = sheet_of(image)
    geometry = MapGeometry((16, 16), (8.0, 8.0))
    show_map(sheet.axes[0], image, values, geometry, GRAYS, Normalize(0, 1))
    drawn = chart_to_rgb(sheet.figure)
    for x, expected in ((3, 0), (40, 0), (48, 128), (56, 255), (92, 255)):
        row, column = place(sheet.axes[0], x, 30, len(drawn))
        assert drawn[row, column] == pytest.approx(expected, abs=12)


@pytest.mark.parametrize("size_hw", [(1, 1), (40, 90), (90, 40)])
def test_maps_cover_the_image(size_hw: tuple[int, int]) -> None:
    """Also if the first location is inside the image, and if the last one is outside."""
    image = blank(*size_hw, 90)
    for origin, count in ((20.0, 1), (0.0, 9)):
        sheet = sheet_of(image)
        geometry = MapGeometry((16, 16), (origin, origin))
        show_map(sheet.axes[0], image, np.ones((count, count)), geometry, GRAYS, Normalize(0, 1))
        left, right, bottom, top = sheet.axes[0].images[1].get_extent()
        assert max(left, top) <= -0.5
        assert right >= size_hw[1] - 0.5
        assert bottom >= size_hw[0] - 0.5
        assert sheet.axes[0].get_xlim() == (-0.5, size_hw[1] - 0.5)


def test_missing_values_have_a_color_of_their_own() -> None:
    image = blank(64, 64, 90)
    values = np.full((4, 4), 0.5)
    values[:, :2] = np.nan
    sheet = sheet_of(image)
    geometry = MapGeometry((16, 16), (8.0, 8.0))
    show_map(sheet.axes[0], image, values, geometry, GRAYS, Normalize(0, 1))
    drawn = chart_to_rgb(sheet.figure)
    row, column = place(sheet.axes[0], 8, 30, len(drawn))
    assert drawn[row, column].tolist() == [255, 0, 255]
    row, column = place(sheet.axes[0], 56, 30, len(drawn))
    assert drawn[row, column] == pytest.approx(128, abs=4)


def test_far_and_nan_marks_are_skipped() -> None:
    sheet = sheet_of(blank(40, 50))
    points = np.array([[np.nan, 3.0], [np.inf, 0.0], [1e12, -1e12], [-500.0, 20.0]])
    draw_dots(sheet.axes[0], points, 4.0, "red")
    draw_lines(sheet.axes[0], np.stack([points, points[::-1]], 1), "red", 1.0)
    dots, lines = sheet.axes[0].collections
    assert len(np.asarray(dots.get_offsets())) == 0
    assert len(lines.get_paths()) == 0
    chart_to_rgb(sheet.figure)
    window = (-0.5, -0.5, 49.5, 39.5)
    assert not is_within(window, points).any()
    assert is_within(window, np.array([[0, 0], [49.4, 39.4], [49.6, 0]])).tolist() == [1, 1, 0]


@pytest.mark.parametrize("size_hw", [(300, 20), (40, 50), (20, 300)])
def test_texts_are_wrapped_to_the_sheet(size_hw: tuple[int, int]) -> None:
    text = "a text that is much longer than the panel is wide " * 4
    window = find_window(blank(*size_hw))
    sheet = make_sheet(text, [text, text], [text] * 3, [window] * 3, 2, [0.0, 1.0])
    canvas: Any = FigureCanvasAgg(sheet.figure)  # has no types
    renderer = canvas.get_renderer()
    boxes = [each.get_window_extent(renderer) for each in sheet.figure.texts]
    titles = [
        next(each for each in axes.findobj(Text) if each.get_text()).get_window_extent(renderer)
        for axes in sheet.axes
    ]
    whole = sheet.figure.bbox
    for box in boxes + titles:
        assert box.x0 >= 0
        assert box.x1 <= whole.x1
        assert 0 <= box.y0 < box.y1 <= whole.y1
    assert min(box.y0 for box in boxes) > max(box.y1 for box in titles)
    assert titles[0].x1 < titles[1].x0
    panels = [axes.get_window_extent(renderer) for axes in sheet.axes]
    assert titles[2].y1 < panels[0].y0 - 5
    assert titles[2].y0 >= panels[2].y1 - 1
    height, width = size_hw
    for panel in panels:
        assert panel.width / panel.height == pytest.approx(width / height)
    corner = sheet.corners[1]
    assert corner[0] == pytest.approx(panels[1].x1 / sheet.figure.dpi)
    assert corner[1] == pytest.approx((whole.y1 - panels[1].y1) / sheet.figure.dpi)


def test_an_svg_has_its_text_as_text_and_its_image_inside(tmp_path: Path) -> None:
    window = find_window(blank(40, 50))
    sheet = make_sheet("A title", ["A note."], ["A caption: $5 px"], [window], 1)
    show_image(sheet.axes[0], blank(40, 50), window)
    path = tmp_path / "a.svg"
    save_chart(sheet.figure, path)
    svg = path.read_text()
    for text in ("A title", "A note.", "A caption: $5 px"):
        assert f">{text}</text>" in svg
    assert "data:image/png;base64," in svg


def test_dim_keeps_the_contrast_of_a_dark_image() -> None:
    image = blank(20, 20, 5)
    image[:, 10:] = 40
    found = dim(image).astype(int)
    assert found[0, 15, 0] - found[0, 5, 0] > 100
    assert found.max() <= 150


def test_fade_keeps_gray_and_part_of_the_colors() -> None:
    assert (fade(blank(4, 4, 77)) == 77).all()
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    assert fade(red, 0.5)[0, 0].tolist() == [130, 30, 30]


@pytest.mark.parametrize(("value", "expected"), [(0.1, 0.1), (1.2, 2), (20.1, 50), (51, 100)])
def test_nice_above(value: float, expected: float) -> None:
    assert nice_above(value) == pytest.approx(expected)
