from __future__ import annotations

import numpy as np
import pytest

from dcnseg.data.label_codes import (
    distinct_colors,
    encode_by_color,
    encode_by_id,
    pack_color,
    unpack_color,
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


def test_colors_become_indices() -> None:
    colors = np.array([[[0, 0, 0], [1, 2, 3], [255, 255, 255], [3, 2, 1]]], np.uint8)
    indices, unknown = encode_by_color(colors, ((1, 2, 3), (0, 0, 0)), ((255, 255, 255),))
    assert indices.tolist() == [[1, 0, 255, 255]]
    assert unknown == {0x030201: 1}


def test_a_255th_class_is_no_ignored_pixel() -> None:
    ids = tuple(range(1000, 1255))
    indices, unknown = encode_by_id(np.array([[1254, 255]]), ids, (255,))
    assert indices.tolist() == [[254, 255]]
    assert unknown == {}


def test_generated_colors_differ_and_repeat() -> None:
    colors = distinct_colors(20_000)
    assert len(set(colors)) == 20_000
    assert colors[:2000] == distinct_colors(2000)
    assert colors[0] not in distinct_colors(10, taken=[colors[0]])
    assert all(unpack_color(pack_color(color)) == color for color in colors[:99])
    # Saved runs and their images have these.
    assert colors[:255:127] == [(57, 147, 230), (242, 186, 145), (15, 103, 153)]
    assert colors[2399] == (75, 166, 92)
    with pytest.raises(ValueError, match="requested 16777216 colors; only 16777215 are left"):
        distinct_colors(1 << 24, taken=[(0, 0, 0)])
