from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dcnseg.data.check.inspection import MaskFacts, from_json, inspect_mask, to_json
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.dataset import load_label_map
from dcnseg.data.mask_file import read_mask_file
from dcnseg.errors import ConfigError

UInt8Array = npt.NDArray[np.uint8]
IDS = (0, 1, 7, 200, 255)
CLASSES = ClassMap(
    tuple(ClassInfo(i, f"c{i}", (i, 255 - i, 40)) for i in IDS[:4]),
    (ClassInfo(255, "void", (255, 255, 255)),),
)


def as_colors(ids: UInt8Array) -> UInt8Array:
    return CLASSES.palette()[ids]


def as_palette(ids: UInt8Array) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette(CLASSES.palette().tobytes())
    return image


ENCODINGS: dict[str, tuple[str, Callable[[UInt8Array], Any]]] = {
    "gray": ("values", Image.fromarray),
    "16 bit": ("values", lambda ids: Image.fromarray(ids.astype(np.uint16))),
    "palette": ("values", as_palette),
    "gray and alpha": ("values", lambda ids: Image.fromarray(np.dstack([ids, ids * 0 + 9]))),
    "colors": ("colors", lambda ids: Image.fromarray(as_colors(ids))),
    "colors and alpha": ("colors", lambda ids: Image.fromarray(as_colors(ids)).convert("RGBA")),
    "equal channels": ("colors", lambda ids: Image.fromarray(np.dstack([ids] * 3))),
}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(IDS), min_size=2, max_size=12),
    st.sampled_from(sorted(ENCODINGS)),
    st.sampled_from([".png", ".tif"]),
)
def test_every_encoding_gives_the_same_label_map(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], name: str, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"mask{suffix}"
    ids = np.array([[0, 7, *values]], np.uint8)  # two values: one alone may be a class's color
    encoding, make = ENCODINGS[name]
    make(ids).save(path)
    assert read_mask_file(path).encoding == encoding
    expected = CLASSES.encode_ids(ids)
    np.testing.assert_array_equal(load_label_map(path, CLASSES), expected)
    facts = inspect_mask(path)
    assert sum(facts.counts.values()) == ids.size
    assert facts.num_values == len(set(ids.ravel().tolist()))
    assert from_json(MaskFacts, to_json(facts)) == facts


@pytest.mark.parametrize("bits", [8, 16])
def test_a_mask_in_the_alpha_channel(tmp_path: Path, bits: int) -> None:
    alpha = np.array([[0, 1, 200]], np.uint16)
    content = np.zeros((1, 3, 4), np.uint16)
    content[..., 3] = alpha
    cv2.imwrite(str(tmp_path / "m.png"), content.astype(np.uint8) if bits == 8 else content)
    mask = read_mask_file(tmp_path / "m.png")
    assert (mask.encoding, mask.bits, mask.mode) == ("alpha", bits, "RGBA")
    assert mask.values.tolist() == alpha.tolist()


@given(st.integers(1, 65535), st.lists(st.integers(0, 65535), min_size=1))
def test_a_threshold_splits_the_gray_values(threshold: int, values: list[int]) -> None:
    class_map = ClassMap.binary(255).with_threshold(threshold)
    gray = np.array([values])
    np.testing.assert_array_equal(class_map.encode_ids(gray), gray >= threshold)
    assert ClassMap.from_dict(class_map.to_dict()) == class_map
    turned = ClassMap(class_map.classes[::-1], (), threshold=threshold)
    np.testing.assert_array_equal(turned.encode_ids(gray), gray < threshold)


def test_a_threshold_leaves_values_out_that_are_ignored_by_name() -> None:
    class_map = ClassMap.binary(255).with_ignored([128]).with_threshold(100)
    assert class_map.encode_ids(np.array([[0, 128, 255]])).tolist() == [[0, 255, 1]]


@pytest.mark.parametrize(("count", "threshold"), [(3, 1), (1, 1), (2, -1), (2, 65536)])
def test_impossible_thresholds_are_refused(count: int, threshold: int) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        ClassMap.from_values(range(count)).with_threshold(threshold)
