from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.image_io import read_image
from dcnseg.inference.overlay import draw_overlay, overlay_colors
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.region_overlay import Mark, draw_marks, lay_out_regions
from dcnseg.inference.regions import Region
from dcnseg.inference.writers import write_prediction
from dcnseg.scoring.objects import find_objects

CLASSES = ClassMap(
    (
        ClassInfo(0, "background", (0, 0, 0)),
        ClassInfo(1, "road", (64, 0, 64)),
        ClassInfo(2, "a long name of a class", (250, 250, 10)),
    )
)
Box = tuple[int, int, int, int]


def make_prediction(labels: np.ndarray) -> Prediction:
    objects = find_objects(labels, (1, 2), min_area=1)
    regions = tuple(
        Region(index, area, tuple(box), tuple(box), 0.9, 0.25, index, 0.25)
        for index, area, box in zip(
            objects.class_indices.tolist(),
            objects.areas.tolist(),
            objects.boxes_xyxy.tolist(),
            strict=True,
        )
    )
    image = np.full((*labels.shape, 3), 90, np.uint8)
    return Prediction(labels, CLASSES, image=image, regions=regions, region_numbers=objects.numbers)


def label_box(mark: Mark) -> Box:
    assert mark.label is not None
    (left, top), (height, width) = mark.corner_xy, mark.label.shape[:2]
    return left, top, left + width, top + height


def do_overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def draw_rectangles(size_hw: tuple[int, int], boxes: list[Box]) -> np.ndarray:
    labels = np.zeros(size_hw, np.uint8)
    for i, (left, top, right, bottom) in enumerate(boxes):
        labels[top:bottom, left:right] = 1 + i % 2
    return labels


def test_a_box_and_a_label_above_it() -> None:
    prediction = make_prediction(draw_rectangles((200, 300), [(50, 80, 90, 110)]))
    assert prediction.image is not None
    plain = draw_overlay(prediction.image, prediction.labels, CLASSES)
    drawn = prediction.overlay()
    (mark,) = prediction.region_marks()
    left, top, right, bottom = label_box(mark)
    assert (left, bottom) == (50, 80)
    color = overlay_colors(CLASSES)[1]
    assert (drawn[top, left:right] == color).all()
    assert (drawn[80, 50:90] == color).all()
    assert (drawn[80:110, 89] == color).all()
    assert 0.1 < (drawn[top:bottom, left:right] != color).any(-1).mean() < 0.6  # the text
    changed = np.argwhere((drawn != plain).any(-1))
    assert changed.min(0).tolist() == [top, 50]
    assert changed.max(0).tolist() == [79, right - 1]  # the outline of the region is its box


def test_text_has_the_name_and_two_digits_of_the_score() -> None:
    def draw_label(score: float, name: str) -> list[list[list[int]]]:
        region = Region(0, 100, (50, 50, 60, 60), (0, 0, 0, 0), 1, score, 0, 1)
        classes = ClassMap((ClassInfo(0, name, (1, 2, 3)),))
        (mark,) = lay_out_regions([region], np.zeros((200, 300), np.int32), classes)
        assert mark.label is not None
        pixels: list[list[list[int]]] = mark.label.tolist()
        return pixels

    assert draw_label(0.254, "car") == draw_label(0.25, "car")
    assert draw_label(0.26, "car") != draw_label(0.25, "car")
    assert len(draw_label(0.25, "cars")[0]) > len(draw_label(0.25, "car")[0])


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((50, 80, 90, 110), (50, None)),  # above
        ((280, 80, 295, 110), (None, 80)),  # reaches the right edge of the image
        ((50, 0, 90, 30), (50, None)),  # below
        ((0, 0, 20, 200), None),  # nowhere
    ],
)
def test_labels_at_the_edges(box: Box, expected: tuple[int | None, int | None] | None) -> None:
    prediction = make_prediction(draw_rectangles((200, 300), [box]))
    (mark,) = prediction.region_marks()
    if expected is None:
        assert mark.label is None
        return
    left, top, right, bottom = label_box(mark)
    assert top in (box[3], box[1] - (bottom - top))
    assert left == (300 - (right - left) if expected[0] is None else expected[0])


def test_a_high_box_has_its_label_inside() -> None:
    prediction = make_prediction(draw_rectangles((400, 600), [(20, 0, 150, 400)]))
    (mark,) = prediction.region_marks()
    assert label_box(mark)[:2] == (20, 0)


def test_a_region_that_fills_the_image_has_a_label_and_no_box() -> None:
    labels = np.ones((300, 500), np.uint8)
    labels[:, 250:] = 0
    labels[20, :] = 1  # a box as wide as the image
    prediction = make_prediction(labels)
    (mark,) = prediction.region_marks()
    assert mark.box_xyxy is None
    left, top, right, bottom = label_box(mark)
    assert prediction.region_mask(0)[top:bottom, left:right].all()


BOXES = st.lists(
    st.tuples(
        st.integers(0, 250), st.integers(0, 180), st.integers(1, 120), st.integers(1, 120)
    ).map(lambda box: (box[0], box[1], min(300, box[0] + box[2]), min(200, box[1] + box[3]))),
    max_size=12,
)


@settings(max_examples=50)
@given(BOXES, st.sampled_from([(200, 300), (256, 512), (200, 3000), (20, 300)]))
def test_labels_hide_nothing(boxes: list[Box], size_hw: tuple[int, int]) -> None:
    prediction = make_prediction(draw_rectangles(size_hw, boxes))
    marks = prediction.region_marks()
    assert prediction.regions is not None
    assert len(marks) == len(prediction.regions)
    labels = [label_box(mark) for mark in marks if mark.label is not None]
    for left, top, right, bottom in labels:
        assert 0 <= left < right <= size_hw[1]
        assert 0 <= top < bottom <= size_hw[0]
    assert not any(do_overlap(*pair) for pair in combinations(labels, 2))
    for region in prediction.regions:
        left, top, right, bottom = region.box_xyxy
        if (right - left) * (bottom - top) <= 100:  # smaller than any label
            assert not any(do_overlap(region.box_xyxy, label) for label in labels)


@settings(max_examples=20)
@given(BOXES, st.lists(st.integers(1, 199), max_size=5, unique=True))
def test_strips_equal_the_whole(boxes: list[Box], cuts: list[int]) -> None:
    prediction = make_prediction(draw_rectangles((200, 300), boxes))
    marks = prediction.region_marks()
    whole = np.zeros((200, 300, 3), np.uint8)
    draw_marks(whole, marks)
    pieces = np.zeros_like(whole)
    for start, stop in pairwise([0, *sorted(cuts), 200]):
        draw_marks(pieces[start:stop], marks, start)
    np.testing.assert_array_equal(pieces, whole)


def test_files_and_arrays_have_the_same_boxes(tmp_path: Path) -> None:
    boxes = [(40, 240, 120, 300), (200, 30, 290, 90), (300, 500, 360, 590)]
    prediction = make_prediction(draw_rectangles((600, 400), boxes))  # strips have 256 rows
    assert prediction.image is not None
    path = tmp_path / "a.jpg"
    write_prediction(prediction, prediction.image, {"overlay": path})
    written = read_image(path)[:600].astype(int)
    assert np.abs(written - prediction.overlay()).mean() < 3  # JPEG
    plain = draw_overlay(prediction.image, prediction.labels, CLASSES)
    assert np.abs(written - plain).mean() > np.abs(written - prediction.overlay()).mean()


def test_a_prediction_without_regions_has_a_plain_overlay() -> None:
    labels = draw_rectangles((200, 300), [(50, 80, 90, 110)])
    image = np.full((200, 300, 3), 90, np.uint8)
    prediction = Prediction(labels, CLASSES, image=image)
    assert prediction.region_marks() == []
    np.testing.assert_array_equal(prediction.overlay(), draw_overlay(image, labels, CLASSES))
