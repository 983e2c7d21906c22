from __future__ import annotations

import math

import numpy as np
import pytest

from dcnseg.visualize.measures.pixel_groups import (
    DISTANCE_LIMITS,
    DISTANCE_NAMES,
    SIZE_NAMES,
    PixelGroups,
    get_cell_shape,
)
from tests.layer_offsets import CLASSES, make_labels

LABELS, NUMBERS = make_labels()


def same_object(groups: PixelGroups) -> dict[int, int]:
    """The number that `groups` gives to each object; each has one."""
    found: dict[int, int] = {}
    for number in np.unique(NUMBERS):
        (found[int(number)],) = np.unique(groups.numbers[number == NUMBERS]).tolist()
    return found


def test_objects_have_different_numbers() -> None:
    groups = PixelGroups.from_labels(LABELS, CLASSES)
    found = same_object(groups)
    assert (found[0], found[-1], found[4]) == (0, -1, 4)
    assert {found[1], found[2], found[3]} == {1, 2, 3}
    for number, area, size in ((1, 180, "small"), (2, 40 * 44, "medium"), (3, 280, "small")):
        assert groups.areas[found[number] - 1] == area
        assert SIZE_NAMES[groups.sizes[found[number]]] == size
    assert SIZE_NAMES[groups.sizes[4]] == "background"


def test_limits_of_sizes_are_those_of_scores() -> None:
    labels = np.zeros((200, 300), np.uint8)
    labels[:32, :32] = labels[40:136, :96] = 1
    labels[:32, 100:131] = labels[40:135, 150:246] = 2
    groups = PixelGroups.from_labels(labels, CLASSES)
    sizes = {int(a): SIZE_NAMES[groups.sizes[i]] for i, a in enumerate(groups.areas, 1)}
    assert sizes == {1024: "medium", 96**2: "large", 992: "small", 95 * 96: "medium"}


def test_distance_matches_a_loop() -> None:
    groups = PixelGroups.from_labels(LABELS, CLASSES)
    border: dict[int, list[tuple[int, int]]] = {}
    for row, column in np.ndindex(*NUMBERS.shape):
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            is_inside = 0 <= y < NUMBERS.shape[0] and 0 <= x < NUMBERS.shape[1]
            if is_inside and NUMBERS[y, x] != NUMBERS[row, column]:
                border.setdefault(int(NUMBERS[row, column]), []).append((row, column))
    for row in range(0, 64, 5):
        for column in range(1, 80, 6):
            own = border[int(NUMBERS[row, column])]
            expected = 0.5 + min(math.dist((row, column), place) for place in own)
            assert groups.border_distance_px[row, column] == pytest.approx(expected, abs=1e-4)


def test_an_image_without_a_border_is_far_from_it() -> None:
    groups = PixelGroups.from_labels(np.ones((8, 9), np.uint8), CLASSES)
    cells = groups.cells_at(np.array([3]), np.array([4]))
    _, _, bins = np.unravel_index(cells, get_cell_shape(3))
    assert DISTANCE_NAMES[bins[0]] == "64+"


def test_cells_tell_size_class_and_distance() -> None:
    groups = PixelGroups.from_labels(LABELS, CLASSES)
    rows, columns = (indices.ravel() for indices in np.indices(LABELS.shape))
    cells = groups.cells_at(rows, columns)
    is_ignored = LABELS.ravel() == 255
    assert (cells[is_ignored] == -1).all()
    sizes, classes, bins = np.unravel_index(cells[~is_ignored], get_cell_shape(3))
    assert (classes == LABELS.ravel()[~is_ignored]).all()
    expected = np.array([len(SIZE_NAMES), 0, 1, 0, 3])[NUMBERS.ravel()[~is_ignored]]
    assert (sizes == expected).all()
    distance = groups.border_distance_px.ravel()[~is_ignored]
    assert (bins == sum((distance >= limit).astype(int) for limit in DISTANCE_LIMITS)).all()


def test_points_outside_and_not_finite() -> None:
    groups = PixelGroups.from_labels(LABELS, CLASSES)
    edges = [[-0.5, 79.49], [-0.51, 0], [63.49, 0], [63.5, 0], [0, -0.6], [0, 79.5]]
    odd = [[np.nan, 0], [0, np.inf], [-np.inf, np.inf], [1e300, 0]]
    found = groups.numbers_at(np.array([edges, [*odd, *odd[:2]]]))
    assert found[0].tolist() == [4, -2, 4, -2, -2, -2]
    assert found[1].tolist() == [-3, -3, -3, -2, -3, -3]
