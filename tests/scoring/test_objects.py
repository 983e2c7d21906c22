from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcnseg.scoring.objects import MIN_AREA, find_objects, mean_iou_by_size, score_objects

Region = frozenset[tuple[int, int]]


def regions(mask: np.ndarray) -> list[Region]:
    """Connected components with 8 neighbors, by flood fill."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = []
    while left:
        todo, region = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.append(frozenset(region))
    return found


# Blocks of 3x3 pixels, so that some objects have 16 pixels and more.
BLOCKS = arrays(np.uint8, (5, 6), elements=st.sampled_from((0, 0, 1, 2, 255)))


@given(BLOCKS, BLOCKS)
def test_equals_a_flood_fill(label_blocks: np.ndarray, other: np.ndarray) -> None:
    labels = np.kron(label_blocks, np.ones((3, 3), np.uint8))
    predicted = np.kron(np.where(other == 255, 1, other), np.ones((3, 3))).astype(np.uint8)
    expected = []
    for index in (1, 2):
        of_class = regions(labels == index)
        found = regions((predicted == index) & (labels != 255))
        for region in (r for r in of_class if len(r) >= MIN_AREA):
            correct = sum(len(region & other) for other in found)
            wrong = sum(
                len(other - frozenset().union(*of_class)) for other in found if other & region
            )
            expected.append((index, len(region), correct / (len(region) + wrong)))
    scores = score_objects(labels, predicted, (1, 2))
    assert sorted((s.class_index, s.area, s.iou) for s in scores) == sorted(expected)


def test_objects_are_numbered_over_classes() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[2:8, 2:8] = 1
    labels[20:30, 20:30] = 2
    labels[35, 35] = 2  # too small
    objects = find_objects(labels, (1, 2))
    assert objects.class_indices.tolist() == [1, 2]
    assert objects.areas.tolist() == [36, 100]
    assert objects.boxes_xyxy.tolist() == [[2, 2, 8, 8], [20, 20, 30, 30]]
    assert np.bincount(objects.numbers.ravel())[1:].tolist() == [36, 100]
    assert len(find_objects(labels, (1, 2), min_area=37)) == 1
    assert len(find_objects(labels, ())) == 0


def test_sizes_are_those_of_coco() -> None:
    labels = np.zeros((400, 400), np.uint8)
    labels[:31, :33] = 1  # 1023 pixels
    labels[40:72, :32] = 1  # 1024
    labels[:96, 100:196] = 1  # 9216
    by_size = mean_iou_by_size(score_objects(labels, labels, (1,)))
    assert by_size == {"small": (1, 1.0), "medium": (1, 1.0), "large": (1, 1.0)}
    assert np.isnan(mean_iou_by_size([])["small"][1])


def test_a_class_of_one_pixel_is_an_object_too_small_to_count() -> None:
    labels = np.zeros((9, 9), np.uint8)
    labels[3, 4] = 1
    assert score_objects(labels, labels, (1,)) == []
    assert find_objects(labels[3:4, 4:5], (1,), min_area=1).areas.tolist() == [1]
    column = np.array([[1], [0], [1], [1]], np.uint8)
    assert find_objects(column, (1,), min_area=1).areas.tolist() == [1, 2]


def test_objects_come_from_top_to_bottom_and_left_to_right() -> None:
    labels = (np.random.default_rng(0).random((40, 60)) < 0.3).astype(np.uint8)
    boxes = find_objects(labels, (1,), min_area=1).boxes_xyxy
    order = [(top, left) for left, top, _, _ in boxes.tolist()]
    assert len(order) > 50
    assert order == sorted(order)
