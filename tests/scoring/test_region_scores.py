from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from dcnseg.scoring.region_scores import ImageRegions, score_regions

SIDE = 24
Box = tuple[int, int, int, int]


def mask(box: Box) -> dict[str, Any]:
    left, top, right, bottom = box
    filled = np.zeros((SIDE, SIDE), np.uint8, order="F")
    filled[top:bottom, left:right] = 1
    encoded: dict[str, Any] = coco_mask.encode(filled)
    return encoded


def image(objects: list[tuple[int, Box]], regions: list[tuple[int, Box, float]]) -> ImageRegions:
    classes = [class_index for class_index, _, _ in regions]
    return ImageRegions(
        [class_index for class_index, _ in objects],
        [mask(box) for _, box in objects],
        classes,
        [mask(box) for _, box, _ in regions],
        [score for _, _, score in regions],
        [1 - score for _, _, score in regions],
        list(classes),
    )


def iou(a: Box, b: Box) -> float:
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / (sum(area) - shared)


def average_precision(
    images: list[tuple[list[tuple[int, Box]], list[tuple[int, Box, float]]]],
    class_index: int,
    min_iou: float,
) -> float:
    """From the definition: the best first, each object once, precision at 101 recalls."""
    count = sum(c == class_index for objects, _ in images for c, _ in objects)
    found: set[tuple[int, int]] = set()
    ranked = sorted(
        (
            (score, i, box)
            for i, (_, regions) in enumerate(images)
            for c, box, score in regions
            if c == class_index
        ),
        key=lambda entry: -entry[0],
    )
    hits = []
    for _, i, box in ranked:
        free = [
            (iou(box, other), j)
            for j, (c, other) in enumerate(images[i][0])
            if c == class_index and (i, j) not in found and iou(box, other) >= min_iou
        ]
        hits.append(bool(free))
        if free:
            found.add((i, max(free)[1]))
    recall = np.cumsum(hits) / count if hits else np.zeros(0)
    precision = np.cumsum(hits) / (1 + np.arange(len(hits))) if hits else np.zeros(0)
    best = [precision[recall >= r - 1e-12].max(initial=0) for r in np.linspace(0, 1, 101)]
    return float(np.mean(best))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    left, top = draw(st.integers(0, SIDE - 4)), draw(st.integers(0, SIDE - 4))
    return left, top, draw(st.integers(left + 2, SIDE)), draw(st.integers(top + 2, SIDE))


@st.composite
def splits(draw: st.DrawFn) -> list[tuple[list[tuple[int, Box]], list[tuple[int, Box, float]]]]:
    """Images with objects, and regions near them and elsewhere; all scores differ."""
    scores = iter(draw(st.permutations(range(1, 40))))
    images = []
    for _ in range(draw(st.integers(1, 3))):
        objects = draw(st.lists(st.tuples(st.integers(0, 1), boxes()), max_size=3, unique=True))
        places = draw(st.lists(boxes(), max_size=2)) + [box for _, box in objects]
        regions = [
            (draw(st.integers(0, 1)), box, next(scores) / 40)
            for box in places
            if draw(st.booleans()) or not objects
        ]
        images.append((objects, regions))
    return images


@given(splits())
def test_average_precision_is_that_of_the_definition(
    images: list[tuple[list[tuple[int, Box]], list[tuple[int, Box, float]]]],
) -> None:
    scores = score_regions([image(*each) for each in images], 2)
    for class_index in (0, 1):
        if any(c == class_index for objects, _ in images for c, _ in objects):
            expected = average_precision(images, class_index, 0.5)
            assert scores.class_ap50[class_index] == pytest.approx(expected)
        else:
            assert np.isnan(scores.class_ap50[class_index])


OBJECTS = [(1, (0, 0, 10, 10)), (2, (12, 12, 20, 20))]


def test_perfect_regions() -> None:
    perfect = image(OBJECTS, [(c, box, 0.9) for c, box in OBJECTS])
    scores = score_regions([perfect], 3)
    assert [scores.ap, scores.ap50, scores.recall] == pytest.approx([1, 1, 1])
    assert scores.accuracy == 1


def test_a_wrong_region_in_an_image_without_objects_counts() -> None:
    perfect = image(OBJECTS, [(c, box, 0.8) for c, box in OBJECTS])
    wrong = image([], [(1, (3, 3, 8, 8), 0.9)])
    scores = score_regions([perfect, wrong], 3)
    assert scores.ap50 == pytest.approx((1 / 2 + 1) / 2)
    # The wrong region has the highest score, and the lowest confidence.
    assert scores.ap50_by_confidence == pytest.approx(1)
    assert scores.recall == 1


def test_accuracy_counts_the_votes_that_are_right() -> None:
    regions = [(1, OBJECTS[0][1], 0.9), (1, OBJECTS[1][1], 0.8), (2, (0, 20, 4, 24), 0.7)]
    base = image(OBJECTS, regions)
    for votes, expected in (([1, 2, None], 1), ([1, 1, 2], 1 / 3), ([None, None, None], 1 / 3)):
        assert score_regions([replace(base, votes=votes)], 3).accuracy == pytest.approx(expected)


def test_the_effect_of_filters() -> None:
    """The regions in the order of their score: right, wrong, right."""
    hits = [(1, OBJECTS[0][1], 0.9), (1, (3, 3, 24, 24), 0.6), (2, OBJECTS[1][1], 0.5)]
    scores = score_regions([image([*OBJECTS, (0, (0, 20, 4, 24))], hits)], 3)
    curve = scores.by_score
    assert curve.thresholds.tolist() == [0.9, 0.6, 0.5]
    assert curve.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert curve.recall.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert scores.precision == pytest.approx(2 / 3)
    assert curve.at_recall(0.5) == (0.9, 1)
    assert list(curve.at_recall(0.95)) == pytest.approx([0.5, 2 / 3])
    assert scores.by_confidence.thresholds.tolist() == pytest.approx([0.5, 0.4, 0.1])


def test_nothing_has_no_scores() -> None:
    scores = score_regions([image([], [])], 2)
    assert np.isnan([scores.ap, scores.ap50, scores.recall, scores.accuracy]).all()
    assert np.isnan([scores.precision, *scores.by_score.at_recall(0.95)]).all()


def test_more_regions_than_coco_counts() -> None:
    cells = [(0, (2 * i, 2 * j, 2 * i + 2, 2 * j + 2)) for i in range(12) for j in range(12)]
    scores = score_regions([image(cells, [(c, box, 0.5) for c, box in cells])], 1)  # 144
    assert scores.recall == 1
