from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image

from dcnseg.visualize.charts import chart_to_rgb
from dcnseg.visualize.figures.panels import Floats, Rgb, is_within
from dcnseg.visualize.figures.point_drawing import (
    draw_points,
    draw_sampling_points,
    write_animation,
)
from dcnseg.visualize.offsets import LayerOffsets, trace_cascade
from dcnseg.visualize.points import NamedPoint, trace_point
from tests.visualize.figures.test_drawing import (
    captions_of,
    legend_of,
    make_image,
    make_layer,
    shift,
)


def draw(image: Rgb, layer: LayerOffsets, point: tuple[float, float], count: int = 2) -> Figure:
    layers = [layer] * count
    return draw_sampling_points(image, layers, NamedPoint(point), trace_point(layers, point))


def dots_of(axes: Axes) -> list[PathCollection]:
    return [child for child in axes.collections if isinstance(child, PathCollection)]


def positions_of(axes: Axes) -> Floats:
    (dots,) = dots_of(axes)
    return np.asarray(dots.get_offsets(), np.float64)


def test_dots_are_at_the_sampling_positions() -> None:
    layer = make_layer(shift(5.0, 0))  # 80 image pixels to the right
    figure = draw(make_image(), layer, (320, 320))
    for i, (depth, moved) in enumerate(((1, 0), (1, 80), (2, 0), (2, 160))):
        found = positions_of(figure.axes[i])
        assert found.mean(0) == pytest.approx([320 + moved, 320])
        assert len(found) == 9**depth
        expected = trace_cascade([layer] * depth, (320, 320), is_plain=moved == 0)
        assert found == pytest.approx(expected.positions_xy.numpy())
        (location, _) = figure.axes[i].lines
        assert location.get_xydata() == pytest.approx(np.array([[320, 320]]))
    assert captions_of(figure)[:4] == [
        "Last layer, plain grid: 9 points",
        "Last layer, deformable: 9 points",
        "Cascade of 2, plain grid: 81 points at 25 positions",
        "Cascade of 2, deformable: 81 points at 25 positions",
    ]
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "Sampling points for (320, 320)"
    assert "Nearest output location: (320, 320)." in texts[1]


def test_points_beyond_the_margin_are_counted() -> None:
    offset = torch.zeros(1, 9, 2, 40, 40)
    offset[0, 0] = -20.0  # one tap 320 px to the upper left
    figure = draw(make_image(), make_layer(offset), (0, 0))
    margin = 0.15 * 640
    for axes in figure.axes[:4]:
        assert axes.get_xlim() == pytest.approx((-0.5 - margin, 639.5))
        assert axes.get_ylim() == pytest.approx((639.5, -0.5 - margin))
    captions = captions_of(figure)
    assert captions[1] == "Last layer, deformable: 1 of 9 points lie outside the drawing"
    assert captions[3] == "Cascade of 2, deformable: 17 of 81 points lie outside the drawing"
    assert len(positions_of(figure.axes[3])) == 64


def test_a_narrow_margin_suffices_for_near_points() -> None:
    figure = draw(make_image(), make_layer(torch.zeros(1, 9, 2, 40, 40)), (0, 0))
    assert figure.axes[0].get_xlim()[0] == pytest.approx(-64 - 0.02 * 640)
    assert not any("outside" in caption for caption in captions_of(figure))


def test_the_area_of_a_dot_is_its_modulation() -> None:
    mask = torch.linspace(0.2, 2, 9).reshape(1, 9, 1, 1).expand(1, 9, 40, 40)
    layer = make_layer(torch.zeros(1, 9, 2, 40, 40), mask)
    figure = draw(make_image(), layer, (320, 320))
    plain, deformed = (dots_of(axes)[0].get_sizes() for axes in figure.axes[:2])
    assert np.ptp(plain) == 0
    assert deformed / plain[0] == pytest.approx(np.linspace(0.2, 2, 9), rel=1e-4)
    products = torch.outer(mask[0, :, 0, 0], mask[0, :, 0, 0]).flatten().clamp(0.08, 4)
    cascade = dots_of(figure.axes[3])[0].get_sizes()
    assert cascade / cascade.max() == pytest.approx(products.numpy() / 4, rel=1e-4)
    assert legend_of(figure.axes[4])[3:] == ["modulation 0.25", "modulation 1", "modulation 2"]
    figure = draw(make_image(), make_layer(torch.zeros(1, 9, 2, 40, 40)), (320, 320))
    assert len(legend_of(figure.axes[4])) == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_offsets_that_are_not_finite(value: float) -> None:
    offset = torch.zeros(1, 9, 2, 10, 10)
    offset[0, 4] = value
    figure = draw(make_image(160, 160), make_layer(offset), (80, 80))
    text = "9 points, 1 not finite" if value != 1e30 else "1 of 9 points lie outside the drawing"
    assert captions_of(figure)[1] == f"Last layer, deformable: {text}"
    chart_to_rgb(figure)


def test_points_of_two_networks_have_the_same_window() -> None:
    networks = [("first", [make_layer(shift(0, 0))] * 4), ("second", [make_layer(shift(5, 0))])]
    points = [NamedPoint((320, 320), "background"), NamedPoint((16, 32))]
    figure = draw_points(make_image(), networks, points)
    captions = captions_of(figure)[:8]
    assert captions == [
        "Background (320, 320). first, last layer: 9 points",
        "(16, 32). first, last layer: 9 points",
        "Background (320, 320). second, last layer: 9 points",
        "(16, 32). second, last layer: 9 points",
        "Background (320, 320). first, cascade of 3: 729 points at 49 positions",
        "(16, 32). first, cascade of 3: 729 points at 49 positions",
        "Background (320, 320). second, cascade of 1: 9 points",
        "(16, 32). second, cascade of 1: 9 points",
    ]
    assert len({axes.get_xlim() for axes in figure.axes[:8]}) == 1
    plain, moved = (np.asarray(dots.get_offsets()) for dots in dots_of(figure.axes[2]))
    assert moved - plain == pytest.approx(np.broadcast_to([80, 0], moved.shape))


def test_many_points_have_one_panel_each() -> None:
    points = [NamedPoint((float(x), 320.0)) for x in range(100, 600, 100)]
    figure = draw_points(make_image(), [("run", [make_layer(shift(0, 0))])], points)
    captions = [caption for caption in captions_of(figure) if caption]
    assert captions == [f"({x}, 320). Cascade of 1: 9 points" for x in range(100, 600, 100)]


def test_animation(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    write_animation(make_image(240, 320), [make_layer(shift(1, 0, 15, 20))] * 2, 5, path)
    with Image.open(path) as image:
        assert image.format == "WEBP"
        assert image.n_frames == 5  # type: ignore[attr-defined]
        assert image.info["loop"] == 0
        frames = []
        for index in range(5):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB"), np.int64))
            assert image.info["duration"] == 90
    for one, other in zip(frames, [*frames[1:], frames[0]], strict=True):
        assert (np.abs(one - other).max(-1) > 60).sum() > 200  # the dots move
        assert ((one[..., 0] - one[..., 2]) > 80).sum() > 100  # orange
    # The background stays.
    assert np.abs(frames[0][:40] - frames[2][:40]).max() < 60


def test_the_moving_point_stays_in_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[tuple[float, float]] = []

    def trace(layers: list[LayerOffsets], xy: tuple[float, float], **options: bool) -> object:
        traced.append(xy)
        return trace_cascade(layers, xy, **options)

    monkeypatch.setattr("dcnseg.visualize.figures.point_drawing.trace_cascade", trace)
    write_animation(
        make_image(240, 320), [make_layer(shift(1, 0, 15, 20))], 12, tmp_path / "a.webp"
    )
    curve = np.array(list(dict.fromkeys(traced)))
    assert len(curve) == 12
    assert is_within((0, 0, 319, 239), curve).all()
    assert (np.ptp(curve, axis=0) > [200, 120]).all()
    steps = np.linalg.norm(curve - np.roll(curve, 1, axis=0), axis=1)
    assert steps.max() < 3 * np.median(steps)  # closed
