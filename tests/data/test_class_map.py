from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcnseg.data import class_info
from dcnseg.data.class_map import (
    IGNORE_INDEX,
    ClassInfo,
    ClassMap,
    UnknownLabelsError,
    find_class_list,
)
from dcnseg.errors import ConfigError, DataError, ShapeError
from tests.data.json_garbage import changed_somewhere, json_text, result_or_message

ROAD = ClassInfo(7, "road", (128, 64, 128))
SKY = ClassInfo(2, "sky", (0, 0, 200))
VOID = ClassInfo(11, "void", (0, 0, 0))


@st.composite
def class_maps(draw: st.DrawFn) -> ClassMap:
    ids = draw(st.lists(st.integers(0, 65535), min_size=1, max_size=20, unique=True))
    channel, count = st.integers(0, 255), len(ids)
    color = st.tuples(channel, channel, channel)
    colors = draw(st.lists(color, min_size=count, max_size=count, unique=True))
    entries = [ClassInfo(i, f"c{i}", color) for i, color in zip(ids, colors, strict=True)]
    num_ignored = draw(st.integers(0, count - 1))
    return ClassMap(tuple(entries[num_ignored:]), tuple(entries[:num_ignored]))


@given(class_maps(), st.data())
def test_round_trip_through_ids_and_colors(class_map: ClassMap, data: st.DataObject) -> None:
    is_decodable = bool(class_map.ignored_ids)
    choices = [*range(class_map.num_classes), *([IGNORE_INDEX] if is_decodable else [])]
    polygons = data.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=30))
    indices = np.array([polygons], np.uint8)
    ids = class_map.decode_indices(indices)
    assert ids.dtype == (np.uint16 if max(class_map.ids) > 255 or ids.max() > 255 else np.uint8)
    np.testing.assert_array_equal(class_map.encode_ids(ids), indices)
    colors = class_map.index_colors()
    known = np.where(indices == IGNORE_INDEX, 0, indices)
    np.testing.assert_array_equal(class_map.encode_colors(colors[known]), known)


@given(class_maps())
def test_round_trip_through_json_and_pickle(class_map: ClassMap) -> None:
    assert ClassMap.from_dict(json.loads(json.dumps(class_map.to_dict()))) == class_map
    assert class_map.ignored_ids is not None  # cached values do not disturb
    assert pickle.loads(pickle.dumps(class_map)) == class_map


TWO = ClassMap((ROAD, SKY), (VOID,))


def test_ids_and_names_follow_the_order_of_the_list() -> None:
    assert TWO.num_classes == 2
    assert TWO.ids == (7, 2)
    assert TWO.names == ("road", "sky")
    assert TWO.ignored_ids == (11, 255)
    assert TWO.encode_ids(np.array([[7, 2, 11, 255]])).tolist() == [[0, 1, 255, 255]]
    assert TWO.index_colors().tolist() == [[128, 64, 128], [0, 0, 200]]
    assert TWO.palette()[[7, 2]].tolist() == [[128, 64, 128], [0, 0, 200]]


def test_255_as_a_class_is_not_ignored() -> None:
    class_map = ClassMap((ClassInfo(0, "ground", (0, 0, 0)), ClassInfo(255, "cell", (9, 9, 9))))
    assert class_map.ignored_ids == ()
    assert class_map.encode_ids(np.array([[0, 255]])).tolist() == [[0, 1]]
    assert class_map.decode_indices(np.array([[0, 1]])).tolist() == [[0, 255]]
    assert class_map.palette()[255].tolist() == [9, 9, 9]
    with pytest.raises(ShapeError, match=r"holds 255; the 2 classes have the indices 0\.\.1"):
        class_map.decode_indices(np.array([[255]]))


@pytest.mark.parametrize("wrong", [2, 254, -1, 256])
def test_decoding_refuses_indices_without_a_class(wrong: int) -> None:
    with pytest.raises(ShapeError, match=f"holds {wrong};"):
        ClassMap((ROAD, SKY)).decode_indices(np.array([[0, wrong]]))


def test_unknown_values_and_colors_are_named_with_their_counts() -> None:
    class_map = replace(ClassMap.from_values(range(11)), source="classes.txt")
    values = np.zeros((30, 30), np.int32)
    values.flat[:412] = 40
    with pytest.raises(UnknownLabelsError) as caught:
        class_map.encode_ids(values)
    assert str(caught.value) == (
        "412 pixels have the value 40; the 11 classes of classes.txt are 0..10 and 255 is ignored."
        " Add a class, or pass --ignore-index 40."
    )
    assert caught.value.counts == {40: 412}
    message = r"6 pixels have the color \(60, 60, 60\); none of the 2 classes of the class list"
    with pytest.raises(UnknownLabelsError, match=message) as caught:
        TWO.encode_colors(np.full((2, 3, 3), 60, np.uint8))
    assert caught.value.counts == {(60, 60, 60): 6}


def test_the_advice_depends_on_the_number_of_unknown_values() -> None:
    with pytest.raises(UnknownLabelsError, match=r"53 pixels have 53 other values; .* blurred the"):
        TWO.encode_ids(np.arange(100, 156)[None])
    with pytest.raises(UnknownLabelsError, match=r"pass --ignore-index 3,8,12,20,21,22,23\.$"):
        TWO.encode_ids(np.array([[12, 3, 3, 8, 20, 21, 22, 23]]))


def test_ignoring_more_ids() -> None:
    class_map = TWO.with_ignored([2, 40, 255, 11])
    assert class_map.names == ("road",)
    assert class_map.ignored_ids == (2, 11, 40, 255)
    assert class_map.with_ignored([40]) == class_map
    with pytest.raises(ConfigError, match="--ignore-index 7 ignores all 1 classes"):
        class_map.with_ignored([7])


def test_colors_are_generated_where_none_are_given() -> None:
    content = {"classes": [{"id": 0, "name": "a"}, {"id": 1, "name": "b", "color": [1, 2, 3]}]}
    class_map = ClassMap.from_dict(content)
    assert not class_map.has_colors
    assert class_map.classes[1].color == (1, 2, 3)
    assert class_map.to_dict() == {**content, "ignore": []}
    with pytest.raises(ConfigError, match="no class colors in the class list"):
        class_map.encode_colors(np.zeros((1, 1, 3), np.uint8))


@pytest.mark.parametrize("ignored", [False, True])
def test_a_color_of_two_entries_cannot_be_decoded(ignored: bool) -> None:
    twin = ClassInfo(3, "twin", ROAD.color)
    class_map = ClassMap((ROAD,), (twin,)) if ignored else ClassMap((ROAD, twin))
    with pytest.raises(ConfigError, match=r"'road' and 'twin' have the same color \(128, 64, 128"):
        class_map.encode_colors(np.zeros((1, 1, 3), np.uint8))
    assert class_map.encode_ids(np.array([[7]])).tolist() == [[0]]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((), "0 classes"),
        (tuple(ClassInfo(i, f"c{i}", (0, 0, 0)) for i in range(256)), "256 classes"),
        ((ROAD, ClassInfo(7, "x", (0, 0, 0))), "the id 7 2 times"),
        ((ROAD, ClassInfo(8, "road", (0, 0, 0))), "the name 'road' 2 times"),
        ((ClassInfo(65536, "x", (0, 0, 0)),), r"the id 65536 of 'x' is not in 0\.\.65535"),
        ((ClassInfo(-1, "x", (0, 0, 0)),), "the id -1"),
        ((ClassInfo(1, " ", (0, 0, 0)),), "id 1 needs a name"),
        ((ClassInfo(1, "x", (0, 0, 256)),), r"color \(0, 0, 256\) of 'x'"),
    ],
)
def test_impossible_lists_are_refused(classes: tuple[ClassInfo, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassMap(classes)


A = {"id": 0, "name": "a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], 'expected {"classes"'),
        ({"classes": {}}, 'expected {"classes"'),
        ({"classes": [], "ignore": []}, "0 classes"),
        ({"classes": [A], "ignore": 255}, '"ignore" must be a list'),
        ({"classes": ["road"]}, "an entry is 'road'"),
        ({"classes": [A], "threshold": True}, '"threshold" is True; expected'),
        ({"classes": [A], "threshold": "1"}, "\"threshold\" is '1'; expected"),
        ({"classes": [A | {"id": "0"}]}, "needs an integer"),
        ({"classes": [A | {"id": True}]}, "needs an integer"),
        ({"classes": [{"id": 0}]}, "needs an integer `id` and a string `name`"),
        ({"classes": [A | {"color": [1, 2]}]}, r"color \[1, 2\] of 'a'"),
        ({"classes": [A | {"color": [1, 2, 300]}]}, r"color \(1, 2, 300\)"),
        ({"classes": [A | {"id": 10**4000}]}, "the id a number of 13288 bits of 'a' is not in"),
        ({"classes": [A | {"id": 0.5, "name": "x" * 1000}]}, r"'x+\.\.\.x+'} needs an integer"),
    ],
)
def test_class_files_of_another_form_are_refused(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        ClassMap.from_file(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 250 + len(str(path))


def test_class_files_are_read(tmp_path: Path) -> None:
    text = tmp_path / "classes.txt"
    text.write_bytes(b"\xef\xbb\xbfsky\r\n\r\n  road side \r\n")
    assert ClassMap.from_file(text).names == ("sky", "road side")
    assert ClassMap.from_file(text).ids == (0, 1)
    assert not ClassMap.from_file(text).has_colors
    listed = tmp_path / "classes.json"
    listed.write_text(json.dumps(TWO.to_dict()))
    assert ClassMap.from_file(listed) == TWO
    assert ClassMap.from_file(listed).source == "classes.json"
    assert ClassMap.from_file(listed).has_colors


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_unreadable_class_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "classes.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"classes\.json: is not a readable class list"):
        ClassMap.from_file(path)


@pytest.mark.parametrize("name", ["classes.json", "classes.txt"])
def test_too_many_classes_are_refused_before_colors_are_made(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(count: int) -> Path:
        entries = [{"id": i, "name": f"c{i}"} for i in range(count)]
        names = "\n".join(f"c{i}" for i in range(count))
        path = tmp_path / name
        path.write_text(json.dumps({"classes": entries}) if path.suffix == ".json" else names)
        return path

    assert ClassMap.from_file(write(255)).num_classes == 255
    monkeypatch.setattr(class_info, "distinct_colors", None)  # would be called too late
    with pytest.raises(DataError, match=rf"{name} has 3000 classes .*; expected 1 to 255"):
        ClassMap.from_file(write(3000))
    ignore = [{"id": 1, "name": "x"}] * 70_000
    with pytest.raises(ConfigError, match="has 70000 ignored entries; expected at most 65535"):
        ClassMap.from_dict({"classes": [{"id": 0, "name": "a"}], "ignore": ignore})


def test_a_class_list_that_is_no_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    os.mkfifo(path)
    assert find_class_list(tmp_path) == path
    with pytest.raises(DataError, match=r"classes\.json: cannot be read \(not a regular file\)"):
        ClassMap.from_file(path)
    path.unlink()
    path.symlink_to(tmp_path / "gone.json")
    assert find_class_list(tmp_path) == path
    with pytest.raises(DataError, match=r"classes\.json: cannot be read \(No such file"):
        ClassMap.from_file(path)


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the name '\\ud800' contains an unpaired surrogate"):
        ClassMap.from_dict({"classes": [A | {"name": "\ud800"}]})


@given(
    changed_somewhere(
        {
            "classes": [{"id": 7, "name": "road", "color": [1, 2, 3]}, {"id": 8, "name": "sky"}],
            "ignore": [{"id": 255, "name": "void"}],
            "threshold": 128,
        }
    )
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_class_list_holds_is_classes_or_an_error(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "classes.json"
    path.write_bytes(json_text(content))
    class_map, message = result_or_message(lambda: ClassMap.from_file(path))
    if class_map is None:
        assert message.startswith(str(path))
        assert len(message.encode()) < 500 + len(str(path))
    else:
        assert 1 <= class_map.num_classes <= 2
        assert ClassMap.from_dict(class_map.to_dict()) == class_map


@given(st.binary(max_size=40))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_classes_txt_holds_is_classes_or_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    class_map, message = result_or_message(lambda: ClassMap.from_file(path))
    assert message.startswith(str(path)) if class_map is None else class_map.num_classes <= 40
