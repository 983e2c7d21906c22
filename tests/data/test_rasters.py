from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcnseg.data.polygons.rasters import decode_runs, fill_ring, unpack_runs

COORDINATES = st.floats(-3, 11, allow_nan=False).map(lambda value: round(value, 3))
CORNERS = st.tuples(COORDINATES, COORDINATES)


def contains(ring: list[tuple[float, float]], x: float, y: float) -> bool:
    """Whether a point lies in an outline: a ray to the left crosses it an odd number of times.

    Points on the outline are rejected: rounding decides on which side they are.
    """
    inside = False
    for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
        if (y0 <= y) != (y1 <= y):
            crossing = x0 + (y - y0) / (y1 - y0) * (x1 - x0)
            assume(abs(crossing - x) > 1e-9)
            inside ^= crossing <= x
    return inside


def pack_runs(counts: list[int]) -> str:
    """The inverse of `unpack_runs`, written from the description of the format."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            is_last = value == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if is_last else 32))
            if is_last:
                break
    return text


@given(st.lists(CORNERS, min_size=3, max_size=6))
@settings(max_examples=60)
def test_pixels_whose_centers_are_inside(ring: list[tuple[float, float]]) -> None:
    expected = [[contains(ring, x + 0.5, y + 0.5) for x in range(8)] for y in range(6)]
    np.testing.assert_array_equal(fill_ring((6, 8), np.array(ring)), expected)


@given(st.lists(CORNERS, min_size=3, max_size=3), CORNERS)
@settings(max_examples=60)
def test_neighbors_share_no_pixel_and_leave_none_out(
    corners: list[tuple[float, float]], point: tuple[float, float]
) -> None:
    triangle = np.array(corners)
    parts = np.zeros((6, 8), int)
    for i in range(3):
        parts ^= fill_ring((6, 8), np.array([corners[i], corners[(i + 1) % 3], point]))
    np.testing.assert_array_equal(parts > 0, fill_ring((6, 8), triangle))


def test_runs_go_down_the_columns() -> None:
    expected = [[False, False, True], [True, False, True]]
    np.testing.assert_array_equal(decode_runs((2, 3), [1, 1, 2, 2]), expected)
    np.testing.assert_array_equal(decode_runs((2, 3), pack_runs([1, 1, 2, 2])), expected)


def test_a_packed_text_worked_out_by_hand() -> None:
    # 5 -> "5"; 40 = 8 + 1 * 32 -> 8 + 32 more -> "X", "1"; 3; 40 + 2 -> "2"; 3 - 1 -> 31 -> "O"
    assert unpack_runs("5X132O") == [5, 40, 3, 42, 2]


@given(st.lists(st.integers(0, 100_000), max_size=12))
def test_packed_runs_come_back(counts: list[int]) -> None:
    assert unpack_runs(pack_runs(counts)) == counts


@pytest.mark.parametrize("text", ["X", "\x2f", "é", "o" * 20, "p"])
def test_damaged_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="run length"):
        unpack_runs(text)


@pytest.mark.parametrize("counts", [[7], [6, -1, 1], [2], [[6]]])
def test_runs_of_another_size_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="do not add up to 3x2 pixels"):
        decode_runs((2, 3), counts)
