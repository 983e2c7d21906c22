from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from dcnseg.data.synthetic import SCENE_CLASSES
from dcnseg.inference.regions import Region
from dcnseg.visualize.charts import chart_to_rgb
from dcnseg.visualize.figures.panels import MOVED, Floats, Rgb, find_class_color
from dcnseg.visualize.figures.region_drawing import PANEL_SIDE, draw_region_bins
from dcnseg.visualize.region_bins import RegionBins
from tests.visualize.figures.test_drawing import captions_of

BOX = (100, 100, 190, 190)


def make_bins(k: int = 3, shift: tuple[float, float] = (30.0, 0.0)) -> RegionBins:
    """A region of class 2 with bins of 90 / k pixels."""
    region = Region(2, 900, BOX, (100.0, 100.0, 190.0, 190.0), 0.8, 0.966, 2, 0.966)
    edges = np.linspace(100, 190, k + 1)
    plain = np.array(
        [[[x, y, x + 90 / k, y + 90 / k] for x in edges[:-1]] for y in edges[:-1]], np.float64
    )
    return RegionBins(region, plain, plain + np.array([*shift, *shift]))


def make_image(height: int = 300, width: int = 400) -> Rgb:
    return np.full((height, width, 3), 90, np.uint8)


def boxes_of(axes: Axes) -> list[list[float]]:
    """Left, top, right and bottom of the rectangles of a panel, from the corner of the image."""
    found = []
    for patch in axes.patches:
        if isinstance(patch, Rectangle) and patch.get_width() > 0:
            (x, y), width, height = patch.get_xy(), patch.get_width(), patch.get_height()
            found.append([x + 0.5, y + 0.5, x + width + 0.5, y + height + 0.5])
    return found


def edges_of(axes: Axes, color: str) -> Floats:
    """The segments of a color in a panel, from the corner of the image."""
    found = [
        np.array(lines.get_segments()).reshape(-1, 2, 2)
        for lines in axes.collections
        if isinstance(lines, LineCollection) and to_hex(np.asarray(lines.get_color())[0]) == color
    ]
    return np.concatenate(found) + 0.5


def test_moved_bins_and_the_box_are_to_scale() -> None:
    bins = make_bins()
    figure = draw_region_bins(make_image(), [bins], SCENE_CLASSES)
    whole, axes = figure.axes[:2]
    assert captions_of(figure)[1] == "1. jade score 0.97, 90x90 px, mean offset 30 px"
    color = find_class_color(SCENE_CLASSES, 2)
    for panel in (whole, axes):
        box = edges_of(panel, color)
        assert [*box.min((0, 1)), *box.max((0, 1))] == list(BOX)
    moved = edges_of(axes, MOVED)
    assert len(moved) == 9 * 4 + 9  # and the ways of the centers
    assert [*moved.min((0, 1)), *moved.max((0, 1))] == [115, 100, 220, 190]
    assert [*moved[:36].min((0, 1)), *moved[:36].max((0, 1))] == [130, 100, 220, 190]
    drawn = boxes_of(axes)
    for row in (*bins.plain.reshape(-1, 4), *bins.moved.reshape(-1, 4)):
        assert any(row == pytest.approx(box) for box in drawn)
    # Box and bins reach from (100, 100) to (220, 190): 120 pixels and 4 % on each side.
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert right - left == bottom - top == pytest.approx(1.08 * 120 + 2)
    assert ((left + right) / 2, (top + bottom) / 2) == (159.5, 144.5)


@pytest.mark.parametrize("k", [3, 6])
def test_plain_bins_are_dashed(k: int) -> None:
    figure = draw_region_bins(make_image(), [make_bins(k, (0.0, 30.0))], SCENE_CLASSES)
    styles = [patch.get_linestyle() for patch in figure.axes[1].patches]
    assert len([style for style in styles if style not in ("-", "solid")]) == k * k
    lines = [each for each in figure.axes[1].collections if isinstance(each, LineCollection)]
    assert len(lines) == (3 if k == 3 else 2)  # no ways of the centers of many bins


def test_far_missing_and_empty_bins() -> None:
    bins = make_bins()
    bins.moved[0, 0] = np.nan
    bins.moved[0, 1] += 1e6
    bins.moved[0, 2] += 500
    bins.plain[2, 2, 2] = bins.plain[2, 2, 0]  # no pixels
    figure = draw_region_bins(make_image(), [bins], SCENE_CLASSES)
    assert captions_of(figure)[1].endswith(", 1 not finite, 2 beyond the margin")
    chart_to_rgb(figure)
    bins.moved[:] = np.nan
    figure = draw_region_bins(make_image(), [bins], SCENE_CLASSES)
    assert captions_of(figure)[1].endswith("90x90 px, 9 not finite")


@pytest.mark.parametrize("size", [(480, 31), (31, 480), (1, 1)])
def test_images_of_any_shape_are_drawn(size: tuple[int, int]) -> None:
    height, width = size
    region = Region(1, 1, (0, 0, width, height), (0.0, 0.0, 1.0, 1.0), 0.8, 0.9, None, 0.9)
    plain = np.array([[[-3.5, -3.5, 4.5, 4.5]]])
    for num_regions in range(1, 7):
        bins = [RegionBins(region, plain, plain - 9)] * num_regions
        figure = draw_region_bins(make_image(height, width), bins, SCENE_CLASSES)
        assert figure.get_figwidth() >= PANEL_SIDE
    chart_to_rgb(figure)
