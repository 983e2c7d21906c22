from __future__ import annotations

import numpy as np
import pytest

from dcnseg.data.label_codes import (
    distinct_colours,
    encode_by_colour,
    encode_by_id,
    pack_colour,
    unpack_colour,
)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_ids_become_indices_whatever_their_width(dtype: type[np.generic]) -> None:
    indices, unknown = encode_by_id(np.array([[9, 4, 9, 200]]).astype(dtype), (4, 9), (200,))
    assert indices.tolist() == [[1, 0, 1, 255]]
    assert indices.dtype == np.uint8
    assert unknown == {}


def test_unknown_values_are_counted_the_most_frequent_first() -> None:
    indices, unknown = encode_by_id(np.array([[-5, 70000, 70000, 0, 3, 3, 3]]), (0,), (255,))
    assert indices.tolist() == [[255, 255, 255, 0, 255, 255, 255]]
    assert list(unknown.items()) == [(3, 3), (70000, 2), (-5, 1)]


def test_colours_become_indices() -> None:
    colours = np.array([[[0, 0, 0], [1, 2, 3], [255, 255, 255], [3, 2, 1]]], np.uint8)
    indices, unknown = encode_by_colour(colours, ((1, 2, 3), (0, 0, 0)), ((255, 255, 255),))
    assert indices.tolist() == [[1, 0, 255, 255]]
    assert unknown == {0x030201: 1}


def test_a_255th_class_is_no_ignored_pixel() -> None:
    ids = tuple(range(1000, 1255))
    indices, unknown = encode_by_id(np.array([[1254, 255]]), ids, (255,))
    assert indices.tolist() == [[254, 255]]
    assert unknown == {}


def test_packing_round_trip() -> None:
    assert pack_colour((1, 2, 255)) == 0x0102FF
    assert unpack_colour(0x0102FF) == (1, 2, 255)


def test_generated_colours_differ_and_repeat() -> None:
    colours = distinct_colours(255)
    assert len(set(colours)) == 255
    assert colours == distinct_colours(255)
    assert colours[0] not in distinct_colours(10, taken=[colours[0]])


def test_any_number_of_colors_is_made_or_refused() -> None:
    colours = distinct_colours(20_000)
    assert len(set(colours)) == 20_000
    assert colours[:2000] == distinct_colours(2000)
    # Saved runs and their pictures have these.
    assert colours[:255:127] == [(57, 147, 230), (242, 186, 145), (15, 103, 153)]
    assert colours[2399] == (75, 166, 92)
    with pytest.raises(ValueError, match="16777216 colors are wanted; 16777215 are left"):
        distinct_colours(1 << 24, taken=[(0, 0, 0)])
