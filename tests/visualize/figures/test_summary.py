from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.quiver import Quiver

from dcnseg.data.class_info import with_colors
from dcnseg.data.class_map import ClassMap
from dcnseg.data.synthetic import SCENE_CLASSES
from dcnseg.visualize.charts import chart_to_rgb
from dcnseg.visualize.figures.panels import FAINT_INK
from dcnseg.visualize.figures.summary import NetworkView, draw_summary
from dcnseg.visualize.offsets import LayerOffsets
from dcnseg.visualize.points import NamedPoint
from tests.visualize.figures.test_drawing import (
    captions_of,
    legend_of,
    make_image,
    make_layer,
    shift,
    stretch,
)
from tests.visualize.figures.test_point_drawing import dots_of

POINTS = [
    NamedPoint((100.0, 100.0), "background"),
    NamedPoint((320.0, 320.0), "small object, jade"),
]


def make_view(name: str, *layers: LayerOffsets, classes: ClassMap = SCENE_CLASSES) -> NetworkView:
    labels = np.zeros((640, 640), np.uint8)
    labels[300:340, 300:340] = 2
    return NetworkView(name, layers, labels, classes)


def test_one_network() -> None:
    layers = make_layer(shift(1, 0)), make_layer(stretch(1.2))
    figure = draw_summary(make_image(), [make_view("run", *layers)], POINTS, "beach")
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "beach: what run sees"
    assert texts[1] == ("Points: A background (100, 100); B small object, jade (320, 320).")
    captions = captions_of(figure)[:4]
    assert captions[0] == "Prediction"
    assert captions[1].startswith(
        "Effective dilation of layer 4.1 conv2: mean 38.4 px, 38.4 to 38.4 px; plain 32 px"
    )
    assert captions[2:] == [
        "Mean offset of layer 4.1 conv2",
        "Sampling points, cascade of the last 2 layers",
    ]
    first, second = (np.asarray(dots.get_offsets()) for dots in dots_of(figure.axes[3]))
    # The output location nearest to (100, 100) is (96, 96); the first layer moves by 16 px.
    assert first.mean(0) == pytest.approx([96 + 16, 96])
    assert second.mean(0) == pytest.approx([320 + 16, 320])
    assert legend_of(figure.axes[4]) == ["jade"]
    chart_to_rgb(figure)


def test_the_prediction_is_tinted() -> None:
    figure = draw_summary(make_image(), [make_view("run", make_layer(shift(0, 0)))], POINTS, "a")
    overlay = np.asarray(figure.axes[0].images[0].get_array())
    assert (overlay[100, 100] == 90).all()
    assert (overlay[310, 310] != 90).any()


def test_networks_side_by_side_have_the_same_scales() -> None:
    views = [make_view("one", make_layer(stretch(1.4))), make_view("two", make_layer(shift(2, 0)))]
    figure = draw_summary(make_image(), views, POINTS, "a")
    assert figure.texts[0].get_text() == "a: what one and two see"
    captions = captions_of(figure)[:8]
    assert captions[:2] == ["one: prediction", "two: prediction"]
    assert [caption[:24] for caption in captions[2:4]] == [
        "one: effective dilation ",
        "two: effective dilation ",
    ]
    norms = [figure.axes[i].images[1].norm for i in (2, 3)]
    assert [(norm.vmin, norm.vmax) for norm in norms] == [(-50, 50)] * 2
    scales = {
        child.scale
        for axes in figure.axes[4:6]
        for child in axes.get_children()
        if isinstance(child, Quiver)
    }
    assert len(scales) == 1


def test_a_plain_network_beside_has_only_a_prediction() -> None:
    views = [make_view("deformable", make_layer(shift(1, 0))), make_view("plain")]
    figure = draw_summary(make_image(), views, POINTS, "a")
    captions = captions_of(figure)
    assert [captions[i] for i in (3, 5, 7)] == ["plain: no deformable layer"] * 3
    chart_to_rgb(figure)


def test_many_points_and_classes() -> None:
    points = [NamedPoint((float(x), 50.0)) for x in range(0, 450, 50)]
    classes = ClassMap(with_colors([(i, f"class_{i}", None) for i in range(20)]))
    labels = np.arange(20, dtype=np.uint8).repeat(32)[:, None].repeat(640, 1)
    view = NetworkView("run", [make_layer(torch.zeros(1, 9, 2, 40, 40))], labels, classes)
    figure = draw_summary(make_image(), [view], points, "a")
    assert len(dots_of(figure.axes[3])) == 5
    names = legend_of(figure.axes[4])
    assert len(names) == 15
    assert names[-1] == "and 6 more"
    assert figure.texts[1].get_color() == FAINT_INK
