from __future__ import annotations

import numpy as np
import pytest

from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.inference import overlay
from dcnseg.inference.overlay import (
    draw_legend,
    draw_overlay,
    draw_overlay_strips,
    overlay_colors,
    present_classes,
)

CLASSES = ClassMap(
    (
        ClassInfo(0, "background", (0, 0, 0)),
        ClassInfo(1, "road", (64, 0, 64)),
        ClassInfo(7, "a very long name of a class", (250, 250, 10)),
    )
)


def make_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_regions_are_tinted_and_outlined() -> None:
    image = make_image(40, 50)
    labels = np.zeros((40, 50), np.uint8)
    labels[10:30, 10:40] = 1
    labels[0, 0] = 255
    drawn = draw_overlay(image, labels, CLASSES, opacity=0.25)
    color = overlay_colors(CLASSES)[1].astype(float)
    np.testing.assert_array_equal(drawn[labels != 1], image[labels != 1])  # background and ignored
    np.testing.assert_array_equal(drawn[10, 10:40], np.tile(color, (30, 1)))
    inner = np.rint(0.75 * image[12:28, 12:38] + 0.25 * color)
    np.testing.assert_allclose(drawn[12:28, 12:38], inner, atol=1)


def test_opacity_0_leaves_the_outlines() -> None:
    image = make_image(40, 50)
    labels = np.ones((40, 50), np.uint8)
    labels[:, 25:] = 2
    drawn = draw_overlay(image, labels, CLASSES, opacity=0)
    changed = (drawn != image).any(-1).any(0)
    assert np.flatnonzero(changed).tolist() == [24, 25]


def test_strips_are_the_whole_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_image(1700, 900)  # outlines wider than a pixel
    rows, columns = np.indices((1700, 900)) // 128
    labels = ((rows + columns) % 3).astype(np.uint8)  # with edges where the strips meet
    strips = list(draw_overlay_strips(image, labels, CLASSES))
    assert [len(strip) for strip in strips] == [256] * 6 + [164]
    monkeypatch.setattr(overlay, "STRIP_ROWS", 2000)
    np.testing.assert_array_equal(np.concatenate(strips), draw_overlay(image, labels, CLASSES))


def test_dark_colors_become_brighter_and_keep_their_hue() -> None:
    colors = overlay_colors(CLASSES)
    assert colors[1].tolist() == [137, 0, 137]
    assert colors[2].max() > 250
    assert colors[0].tolist() == colors[9].tolist() == [0, 0, 0]


def test_legend_names_the_classes_of_the_image_and_wraps() -> None:
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    present = present_classes(labels, CLASSES.num_classes)
    assert present == [0, 1, 2]
    wide, narrow = draw_legend(CLASSES, present, 600), draw_legend(CLASSES, present, 200)
    assert wide.shape[1] == 600
    assert len(narrow) == 2 * len(draw_legend(CLASSES, [1], 200))  # two lines
    for color in overlay_colors(CLASSES)[1:3]:
        assert (wide == color).all(-1).any()
