from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.image_io import read_image
from dcnseg.scoring.bootstrap import Interval
from dcnseg.visualize.charts import (
    INK,
    chart_to_svg,
    draw_class_balance,
    draw_class_scores,
    draw_comparison,
    draw_confusion,
    draw_training_curves,
    save_chart,
)

CLASSES = ClassMap(
    (
        ClassInfo(0, "background", (0, 0, 0)),
        ClassInfo(1, "a $name$ & <more>", (255, 255, 255)),
        ClassInfo(2, "car", (200, 30, 30)),
    )
)


def texts_of(figure: Figure) -> list[str]:
    root = ET.fromstring(chart_to_svg(figure, "x"))
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]


def record(epoch: int, **values: Any) -> dict[str, Any]:
    return {"epoch": epoch, "loss": 1 / epoch, "lr": 0.01, "seconds": 1.0} | values


EVALUATED = {
    "mean_iou": 0.5,
    "pixel_accuracy": 0.8,
    "class_iou": {"background": 0.9, "a $name$ & <more>": None, "car": 0.1},
    "offsets": {"encoder.layer4.0.conv2": {"mean_px": 0.3}},
}


def test_curves_of_evaluated_and_other_epochs() -> None:
    records = [record(1, loss=None), record(2, **EVALUATED), record(3)]
    figure = draw_training_curves(records, CLASSES)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles[-2:] == ["Mean offset length", "Validation IoU per class"]
    loss = figure.axes[0].lines[0]
    assert loss.get_xdata().tolist() == [2, 3]  # type: ignore[union-attr]
    assert "0.500" in texts_of(figure)


def test_the_axes_include_the_curves_of_all_layers() -> None:
    lengths = {"encoder.layer4.0.conv2": {"mean_px": 0.3}, "encoder.layer4.1.conv2": {"mean_px": 3}}
    records = [record(epoch, **EVALUATED | {"offsets": lengths}) for epoch in (1, 2)]
    axes = draw_training_curves(records, CLASSES).axes
    (lengths_axes,) = [each for each in axes if each.get_title(loc="left") == "Mean offset length"]
    low, high = lengths_axes.get_ylim()
    assert low == 0
    assert high > 3


def test_curves_of_a_plain_network_have_no_offsets() -> None:
    plain = {key: value for key, value in EVALUATED.items() if key != "offsets"}
    figure = draw_training_curves([record(1, **plain)], CLASSES)
    assert sum(axes.get_visible() for axes in figure.axes) == 4


def test_rows_of_the_confusion_matrix_add_up_to_1() -> None:
    confusion = np.array([[8, 2, 0], [0, 0, 0], [1200, 0, 3600]])
    texts = texts_of(draw_confusion(confusion, CLASSES.names))
    assert {"0.80", "0.20", "0.25", "0.75"} <= set(texts)
    counts = texts_of(draw_confusion(confusion, CLASSES.names, is_normalized=False))
    assert {"8", "2", "1.2k", "3.6k"} <= set(counts)


def test_balance_and_scores_name_every_class() -> None:
    balance = draw_class_balance(np.array([900, 0, 100]), CLASSES)
    assert {"0.9", "0", "0.1", "car", "a $name$ & <more>"} <= set(texts_of(balance))
    scores = {"IoU": np.array([0.5, np.nan, 1.0]), "recall": np.array([0.6, np.nan, 1.0])}
    assert {"IoU", "recall", "car"} <= set(texts_of(draw_class_scores(scores, CLASSES.names)))


def test_comparison_shows_every_variant() -> None:
    sizes = {"small": 0.4, "medium": float("nan"), "large": 0.9}
    figure = draw_comparison(
        {"plain": [0.5, 0.52], "deformable": [0.6, 0.61]},
        {"plain": sizes, "deformable": sizes},
        {"deformable over plain": Interval(0.1, 0.05, 0.15)},
    )
    assert {"plain", "deformable", "deformable over plain", "0.510"} <= set(texts_of(figure))


def test_charts_are_written_whole(tmp_path: Path) -> None:
    figure = draw_class_balance(np.array([1, 2, 3]), CLASSES)
    save_chart(figure, tmp_path / "chart.png")
    assert read_image(tmp_path / "chart.png").shape[1] > 600
    save_chart(figure, tmp_path / "chart.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chart.png", "chart.svg"]


@pytest.mark.parametrize("label", ["Curves", 'a "quoted" <label>'])
def test_svg_takes_the_color_of_the_page(label: str) -> None:
    svg = chart_to_svg(draw_class_balance(np.array([1, 2, 3]), CLASSES), label)
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"] == label
    assert not {"width", "height"} & set(root.attrib)
    assert "currentColor" in svg
    assert INK not in svg
