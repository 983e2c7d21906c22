from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch

from dcnseg.ops.offset_stats import OffsetStatistics, TapGrid
from dcnseg.visualize import drawing
from dcnseg.visualize.canvas import Rgb, colorize
from dcnseg.visualize.drawing import (
    draw_effective_dilation,
    draw_offset_field,
    draw_sampling_points,
)
from dcnseg.visualize.geometry import MapGeometry
from dcnseg.visualize.offsets import LayerOffsets, compute_effective_dilation, trace_cascade

Indices = npt.NDArray[np.signedinteger]

GRID = TapGrid((3, 3), (1, 1), (2, 2), (2, 2))
CAPTION_AND_TITLE = 130  # canvas pixels at the top of a page


def make_layer(offset: torch.Tensor, mask: torch.Tensor | None = None) -> LayerOffsets:
    geometry = MapGeometry((16, 16), (0.0, 0.0))
    statistics = OffsetStatistics(1.0, 2.0, 0.25, 0.125)
    height, width = offset.shape[-2:]
    return LayerOffsets("layer4.conv2", offset, mask, GRID, (height, width), geometry, statistics)


def make_image(height: int = 640, width: int = 640) -> Rgb:
    return np.full((height, width, 3), 90, np.uint8)


def draw_points(image: Rgb, layer: LayerOffsets, point: tuple[float, float]) -> Rgb:
    last = [trace_cascade([layer], point, is_plain=plain) for plain in (True, False)]
    cascade = [trace_cascade([layer] * 2, point, is_plain=plain) for plain in (True, False)]
    return draw_sampling_points(
        image, GRID, (last[0], last[1]), (cascade[0], cascade[1]), ["first", "second"]
    )


def pixels_of(rgb: Rgb, color: tuple[int, ...]) -> tuple[Indices, Indices]:
    rows, columns = np.nonzero((rgb == color).all(-1))
    return rows, columns


def test_dots_are_at_the_sampling_positions() -> None:
    offset = torch.zeros(1, 9, 2, 40, 40)
    offset[0, :, 1] = 5.0  # 80 image pixels to the right
    page = draw_points(make_image(), make_layer(offset), (320, 320))
    height, width = page.shape[0] // 2, page.shape[1] // 2

    def center(quarter: Rgb, color: tuple[int, int, int]) -> list[float]:
        ys, xs = pixels_of(quarter, color)
        return [(xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2]

    for rows, shift in ((slice(height), 80), (slice(height, None), 160)):
        for columns, expected in ((slice(width), 0), (slice(width, None), shift)):
            red = center(page[rows, columns], drawing.RED)
            green = center(page[rows, columns], drawing.GREEN)
            assert np.subtract(red, green) == pytest.approx([expected, 0], abs=1)


def test_samples_outside_the_image_are_drawn_in_the_margin() -> None:
    widths = []
    for shift in (-20.0, -5.0):  # of one tap to the upper left: 320 px, 80 px
        offset = torch.zeros(1, 9, 2, 40, 40)
        offset[0, 0] = shift
        widths.append(draw_points(make_image(), make_layer(offset), (0, 0)).shape[1])
    # In a cascade of two the first reaches 2 * (32 + 320) pixels, beyond the maximum margin.
    assert widths[0] == 2 * (640 + 480 + 19) + 3 * 16
    panel_width = 640 + 2 * (32 + 80) + 2 * 19
    assert widths[1] == pytest.approx(2 * panel_width + 3 * 16, abs=8)


def test_heat_map_colors_match_the_values() -> None:
    offset = torch.zeros(1, 9, 2, 40, 40)
    # Twice the dilation in the right half.
    steps = torch.tensor([[-2.0, 0.0, 2.0]])
    offset[0, :, 0, :, 20:] = steps.repeat_interleave(3).reshape(9, 1, 1)
    offset[0, :, 1, :, 20:] = steps.repeat(1, 3).reshape(9, 1, 1)
    layer = make_layer(offset)
    dilation = compute_effective_dilation(layer).numpy()
    assert np.unique(dilation).tolist() == [32.0, 64.0]
    page = draw_effective_dilation(make_image(), layer)[:, : 2 * 640 + 3 * 16]
    (colors,) = colorize(np.array([[32.0, 64.0]]), 32, 64, cv2.COLORMAP_VIRIDIS).tolist()
    (_, left), (_, right) = (pixels_of(page, tuple(color)) for color in colors)
    start = 16 + 640 + 16  # the second panel
    # Location 19 is at pixel 304 and location 20 at 320; colors are interpolated in between.
    assert left.min() == start
    assert left.max() == pytest.approx(start + 304, abs=1)
    assert right.min() == pytest.approx(start + 320, abs=1)
    assert right.max() == start + 639


def test_arrows_point_along_the_mean_displacement() -> None:
    offset = torch.zeros(1, 9, 2, 40, 40)
    offset[0, :, 0] = 1.0  # down, by one pixel of the map
    page = draw_offset_field(make_image(), make_layer(offset))
    panel = page[page.shape[0] // 2 + 60 :, : 16 + 640]
    rows, columns = pixels_of(panel, drawing.YELLOW)
    assert len(rows)
    # The heads are the widest part of the arrows; compare a single arrow.
    first = columns < columns.min() + 24
    ys, counts = np.unique(rows[first & (rows < rows.min() + 30)], return_counts=True)
    assert ys[counts.argmax()] > ys.mean()


@pytest.mark.parametrize("size_hw", [(8, 12), (300, 40), (64, 1000)])
def test_images_of_any_shape(size_hw: tuple[int, int]) -> None:
    height, width = (max(-(-side // 16), 1) for side in size_hw)
    layer = make_layer(torch.randn(2, 9, 2, height, width), mask=torch.rand(2, 9, height, width))
    image = make_image(*size_hw)
    for page in (
        draw_effective_dilation(image, layer),
        draw_offset_field(image, layer),
        draw_points(image, layer, (3, 4)),
    ):
        assert page.dtype == np.uint8
        assert page.shape[1] >= 400


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_offsets_that_are_not_finite(value: float) -> None:
    offset = torch.randn(1, 9, 2, 10, 10)
    offset[0, 4, :, :5] = value
    layer, broken = make_layer(offset), make_layer(torch.full((1, 9, 2, 10, 10), value))
    image = make_image(160, 160)
    page = draw_effective_dilation(image, layer)
    has_gap = len(pixels_of(page, (255, 0, 255))[0]) > 1000
    assert has_gap == (value != 1e30)
    draw_offset_field(image, layer)
    draw_points(image, layer, (3, 4))
    draw_offset_field(image, broken)
    draw_effective_dilation(image, broken)


def test_zero_offsets_give_a_uniform_heat_map() -> None:
    layer = make_layer(torch.zeros(1, 9, 2, 10, 10))
    page = draw_effective_dilation(make_image(160, 160), layer)
    panel = page[CAPTION_AND_TITLE : CAPTION_AND_TITLE + 400, 700:1200]
    assert (panel == panel[0, 0]).all()
