from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from dcnseg.ops.offset_stats import OffsetStatistics, TapGrid
from dcnseg.visualize.charts import chart_to_rgb
from dcnseg.visualize.figures.drawing import (
    DILATION_COLORS,
    draw_effective_dilation,
    draw_offset_flow,
    find_dilation_limit,
    find_flow_scale,
)
from dcnseg.visualize.figures.panels import MISSING, Floats, Rgb
from dcnseg.visualize.geometry import MapGeometry
from dcnseg.visualize.offsets import LayerOffsets
from tests.visualize.figures.test_panels import place

GRID = TapGrid((3, 3), (1, 1), (2, 2), (2, 2))  # kernel, stride, padding, dilation


def make_layer(offset: torch.Tensor, mask: torch.Tensor | None = None) -> LayerOffsets:
    geometry = MapGeometry((16, 16), (0.0, 0.0))
    statistics = OffsetStatistics(1.0, 2.0, 0.25, 0.125)
    size = int(offset.shape[-2]), int(offset.shape[-1])
    name = "encoder.layer4.1.conv2"
    return LayerOffsets(name, offset, mask, GRID, size, geometry, statistics)


def make_image(height: int = 640, width: int = 640) -> Rgb:
    return np.full((height, width, 3), 90, np.uint8)


def stretch(factor: float, height: int = 40, width: int = 40) -> torch.Tensor:
    """Offsets that multiply the dilation of GRID by a factor."""
    steps = torch.tensor([-2.0, 0.0, 2.0]) * (factor - 1)
    offset = torch.zeros(1, 9, 2, height, width)
    offset[0, :, 0] = steps.repeat_interleave(3).reshape(9, 1, 1)
    offset[0, :, 1] = steps.repeat(3).reshape(9, 1, 1)
    return offset


def legend_of(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def captions_of(figure: Figure) -> list[str]:
    return [axes.get_title("left").replace("\n", " ") for axes in figure.axes]


def test_dilation_colors_match_the_values() -> None:
    offset = torch.zeros(1, 9, 2, 40, 40)
    offset[..., 20:] = stretch(1.5)[..., 20:]
    figure = draw_effective_dilation(make_image(), [make_layer(offset)])
    drawn = chart_to_rgb(figure)
    for x, percent in ((200, 0), (450, 50)):
        expected = 255 * np.array(DILATION_COLORS((percent + 50) / 100)[:3])
        row, column = place(figure.axes[1], x, 300, len(drawn))
        assert drawn[row, column] == pytest.approx(expected, abs=4)
    captions = captions_of(figure)
    assert captions[0] == "Input image"
    assert captions[1] == (
        "Layer 4.1 conv2: mean 40 px, 32 to 48 px; plain 32 px (dilation 2, stride 16 px). "
        "40x40 locations"
    )
    labels = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert labels[0] == "-50 %, 16 px"
    assert labels[5] == "plain, 32 px"
    assert labels[-1] == "+50 %, 48 px"


def test_all_layers_have_the_same_scale_around_plain() -> None:
    layers = [make_layer(stretch(factor)) for factor in (1.0, 0.9, 1.3)]
    images = [axes.images[1] for axes in draw_effective_dilation(make_image(), layers).axes[1:4]]
    assert {(image.norm.vmin, image.norm.vmax) for image in images} == {(-50, 50)}
    values = [float(np.asarray(image.get_array()).mean()) for image in images]
    assert values == pytest.approx([0, -10, 30], abs=1e-4)


@pytest.mark.parametrize(
    ("factor", "limit"), [(1, 25), (0.95, 25), (1.26, 50), (1.6, 75), (2.9, 200), (50, 1000)]
)
def test_dilation_limit(factor: float, limit: float) -> None:
    assert find_dilation_limit([make_layer(stretch(factor)), make_layer(stretch(1))]) == limit


def test_padding_has_no_influence_on_the_scale_and_is_framed() -> None:
    offset = stretch(3.0, 20, 30)
    offset[..., 2:18, 2:28] = stretch(1.1, 16, 26)
    layer = make_layer(offset)
    assert find_dilation_limit([layer]) == 25
    figure = draw_effective_dilation(make_image(320, 480), [layer])
    (frame,) = figure.axes[1].patches
    box = frame.get_extents().transformed(figure.axes[1].transData.inverted())
    # The inner locations 2..17 and 2..27, half a cell of 16 pixels around each.
    assert sorted((box.x0, box.x1)) == pytest.approx([1.5 * 16, 27.5 * 16])
    assert sorted((box.y0, box.y1)) == pytest.approx([1.5 * 16, 17.5 * 16])
    tiny = make_layer(stretch(1.1, 4, 4))  # no location without padding
    assert not draw_effective_dilation(make_image(64, 64), [tiny]).axes[1].patches


def test_the_bar_of_a_wide_scale_ends_at_zero() -> None:
    figure = draw_effective_dilation(make_image(), [make_layer(stretch(3.0))])
    assert figure.axes[2].get_ylim() == (-100, 200)


def test_several_plain_dilations_are_in_the_labels() -> None:
    other = LayerOffsets(
        **{**vars(make_layer(stretch(1))), "input_geometry": MapGeometry((8, 8), (0.0, 0.0))}
    )
    figure = draw_effective_dilation(make_image(), [make_layer(stretch(1)), other])
    labels = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert labels[5] == "plain, 16 / 32 px"
    assert labels[-1] == "+25 %, 20 / 40 px"


def shift(dx: float, dy: float, height: int = 40, width: int = 40) -> torch.Tensor:
    return torch.tensor([dy, dx]).reshape(1, 1, 2, 1, 1).expand(1, 9, 2, height, width).clone()


def flow_colors(figure: Figure) -> Floats:
    return np.asarray(figure.axes[1].images[1].get_array(), np.float64)


@pytest.mark.parametrize(
    ("dx", "dy", "color"),
    [(1, 0, "#ff0000"), (0, 1, "#80ff00"), (-1, 0, "#00ffff"), (0, -1, "#8000ff"), (0, 0, "white")],
)
def test_flow_colors_show_the_direction(dx: float, dy: float, color: str) -> None:
    layer = make_layer(shift(20 / 16 * dx, 20 / 16 * dy))  # 20 image pixels
    assert find_flow_scale([layer], make_image()).limit_px == (20 if dx or dy else 0.1)
    colors = flow_colors(draw_offset_flow(make_image(), [layer]))
    assert colors == pytest.approx(np.broadcast_to(to_rgb(color), colors.shape), abs=0.01)


def test_saturation_shows_the_length() -> None:
    offset = shift(1.25, 0)
    offset[..., 20:] /= 2
    colors = flow_colors(draw_offset_flow(make_image(), [make_layer(offset)]))
    assert colors[5, 5] == pytest.approx([1, 0, 0])
    assert colors[5, 30] == pytest.approx([1, 0.5, 0.5])


def test_arrows_have_the_direction_and_the_length_of_the_mean_offset() -> None:
    layers = [make_layer(shift(0.5, -0.25)), make_layer(shift(0, 1.0))]
    figure = draw_offset_flow(make_image(), layers)
    arrows = [
        next(child for child in figure.axes[i].get_children() if isinstance(child, Quiver))
        for i in (1, 3)
    ]
    assert (np.asarray(arrows[0].U) == 8).all()
    assert (np.asarray(arrows[0].V) == -4).all()  # up
    assert (np.asarray(arrows[1].V) == 16).all()
    assert arrows[0].scale == arrows[1].scale == 1 / 3  # three times as long as the offsets
    assert {tuple(xy % 16) for xy in np.asarray(arrows[0].XY)} == {(0, 0)}  # at output locations
    captions = captions_of(figure)
    assert captions[0] == (
        "Layer 4.1 conv2, sampling grids: 25 % of the points outside the feature map (plain 12.5 %)"
    )
    assert captions[1].endswith("Length of the single offsets: mean 8.94 px, 8.94 to 8.94 px")


@pytest.mark.parametrize(("size_hw", "count"), [((4, 5), 4), ((8, 10), 4), ((40, 40), 30)])
def test_at_least_four_sampling_grids_are_drawn(size_hw: tuple[int, int], count: int) -> None:
    height, width = size_hw
    figure = draw_offset_flow(
        make_image(16 * height, 16 * width), [make_layer(shift(1, 2, *size_hw))]
    )
    plain, deformed = (
        lines for lines in figure.axes[0].collections if isinstance(lines, LineCollection)
    )
    for lines, offset in ((plain, (0, 0)), (deformed, (16, 32))):
        segments = np.array(lines.get_segments())
        assert len(segments) == 12 * count
        low, high = segments.min((0, 1)), segments.max((0, 1))
        middle = (low + high) / 2 - offset
        assert middle == pytest.approx([8 * width - 8, 8 * height - 8], abs=16)


@pytest.mark.parametrize("size_hw", [(1, 1), (300, 40), (64, 1000)])
def test_images_of_any_shape(size_hw: tuple[int, int]) -> None:
    height, width = (max(-(-side // 16), 1) for side in size_hw)
    layer = make_layer(torch.randn(2, 9, 2, height, width), mask=torch.rand(2, 9, height, width))
    for draw in (draw_effective_dilation, draw_offset_flow):
        assert chart_to_rgb(draw(make_image(*size_hw), [layer])).shape[1] >= 400


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_offsets_that_are_not_finite(value: float) -> None:
    offset = torch.zeros(1, 9, 2, 10, 10)
    offset[0, 4, :, :5] = value
    broken = make_layer(torch.full((1, 9, 2, 10, 10), value))
    image = make_image(160, 160)
    figure = draw_effective_dilation(image, [make_layer(offset)])
    drawn = chart_to_rgb(figure)
    row, column = place(figure.axes[1], 80, 20, len(drawn))
    has_gap = drawn[row, column].tolist() == [int(MISSING[i : i + 2], 16) for i in (1, 3, 5)]
    assert has_gap == (value != 1e30)
    assert ("(50 not finite)" in captions_of(figure)[1]) == has_gap
    chart_to_rgb(draw_offset_flow(image, [make_layer(offset), broken]))
    chart_to_rgb(draw_effective_dilation(image, [broken]))
