from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from dcnseg.data.synthetic import SCENE_CLASSES
from dcnseg.inference.overlay import overlay_colors
from dcnseg.inference.regions import Region
from dcnseg.visualize import region_drawing
from dcnseg.visualize.canvas import Rgb
from dcnseg.visualize.drawing import RED
from dcnseg.visualize.region_bins import RegionBins
from dcnseg.visualize.region_drawing import PANEL_SIDE, draw_region_bins

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


def draw(
    monkeypatch: pytest.MonkeyPatch, *bins: RegionBins, image: Rgb | None = None
) -> list[tuple[str, Rgb]]:
    """Draw a figure, and return its captions and panels."""
    found: list[tuple[str, Rgb]] = []

    def compose(panels: Sequence[tuple[str, Rgb]], *_: object) -> Rgb:
        found.extend(panels)
        return make_image()

    monkeypatch.setattr(region_drawing, "compose", compose)
    draw_region_bins(make_image() if image is None else image, bins, SCENE_CLASSES)
    return found


def extent_of(panel: Rgb, color: npt.ArrayLike) -> tuple[float, float, float, float]:
    """The left, top, right and bottom of the pixels of a color, the last two exclusive."""
    rows, columns = np.nonzero((panel == np.asarray(color)).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_moved_bins_and_the_box_are_to_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, whole), (caption, panel) = draw(monkeypatch, make_bins())
    assert caption == "1. jade score 0.97, 90x90 px, mean offset 30 px"
    # Box and bins reach from (100, 100) to (220, 190): a window of ceil(1.08 * 120) + 2 pixels.
    side = 132
    scale = PANEL_SIDE / side
    corner_xy = np.array([160 - side / 2, 145 - side / 2])
    color = overlay_colors(SCENE_CLASSES)[2]

    def to_panel(*box: float) -> list[float]:
        return list(((np.array(box).reshape(2, 2) - corner_xy) * scale).ravel())

    left, top, _, bottom = extent_of(panel, color)  # bins cover the right edge
    expected = to_panel(*BOX)
    assert [left, top, bottom] == pytest.approx([*expected[:2], expected[3]], abs=3)
    # The upper edge of the first row, without the lines between the centers.
    (_, first, _, last) = to_panel(0, 95, 0, 105)
    left, _, right, _ = extent_of(panel[round(first) : round(last)], RED)
    assert [left, right] == pytest.approx(to_panel(130, 0, 220, 0)[::2], abs=3)
    _, top, right, bottom = extent_of(panel, RED)
    assert [top, right, bottom] == pytest.approx(to_panel(0, 100, 220, 190)[1:], abs=3)
    assert whole.shape == (360, 480, 3)
    left, _, right, bottom = extent_of(whole, color)  # the number is above the box
    expected = [v * PANEL_SIDE / 400 for v in BOX]
    assert [left, right, bottom] == pytest.approx([expected[0], *expected[2:]], abs=2)


@pytest.mark.parametrize("k", [3, 6])
def test_plain_bins_are_dashed(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    _, (_, panel) = draw(monkeypatch, make_bins(k, (0.0, 30.0)))
    # The edge at x = 130 between y = 102 and 128, above the moved bins.
    scale, corner_xy = PANEL_SIDE / 132, np.array([145 - 66, 160 - 66])
    (x, top), (_, bottom) = np.rint((np.array([[130, 102], [130, 128]]) - corner_xy) * scale)
    edge = panel[int(top) : int(bottom), int(x) - 1 : int(x) + 2].max(axis=(1, 2))
    is_dash = edge > 140  # the image is 90
    assert 0.4 < is_dash.mean() < 0.8
    assert np.count_nonzero(np.diff(is_dash)) >= 8


def test_far_missing_and_empty_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    bins = make_bins()
    bins.moved[0, 0] = np.nan
    bins.moved[0, 1] += 1e6
    bins.moved[0, 2] += 500
    bins.plain[2, 2, 2] = bins.plain[2, 2, 0]  # no pixels
    _, (caption, panel) = draw(monkeypatch, bins)
    assert caption.endswith(", 1 not finite, 2 beyond the margin")
    assert panel.shape == (PANEL_SIDE, PANEL_SIDE, 3)
    bins.moved[:] = np.nan
    assert draw(monkeypatch, bins)[1][0].endswith("90x90 px, 9 not finite")


@pytest.mark.parametrize("size", [(480, 31), (31, 480), (1, 1)])
def test_images_of_any_shape_are_drawn(size: tuple[int, int]) -> None:
    height, width = size
    region = Region(1, 1, (0, 0, width, height), (0.0, 0.0, 1.0, 1.0), 0.8, 0.9, None, 0.9)
    plain = np.array([[[-3.5, -3.5, 4.5, 4.5]]])
    for num_regions in range(1, 7):
        bins = [RegionBins(region, plain, plain - 9)] * num_regions
        page = draw_region_bins(make_image(height, width), bins, SCENE_CLASSES)
        assert page.shape[1] >= PANEL_SIDE
