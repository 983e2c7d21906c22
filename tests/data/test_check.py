from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dcnseg.data.check import inspect_samples
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.folders import pair_samples
from dcnseg.data.image_io import write_png
from dcnseg.errors import DataError

CLASSES = ClassMap(
    tuple(ClassInfo(i, f"c{i}", (i, 100, 0)) for i in range(3)), source="classes.json"
)


def write_pair(root: Path, stem: str, mask: list[list[int]]) -> None:
    array = np.array(mask, np.uint8)
    write_png(root / "images" / f"{stem}.png", np.zeros((*array.shape, 3), np.uint8))
    write_png(root / "masks" / f"{stem}.png", array)


def test_the_summary_counts_pixels_and_pictures(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", [[0, 1, 1, 255]])
    write_pair(tmp_path, "b", [[1], [1], [255]])
    calls: list[tuple[int, int]] = []
    summary = inspect_samples(
        pair_samples(tmp_path), CLASSES, on_progress=lambda *call: calls.append(call)
    )
    assert summary.num_images == 2
    assert summary.min_size_hw == (1, 1)
    assert summary.max_size_hw == (3, 4)
    assert summary.pixel_counts == [1, 4, 0]
    assert summary.image_counts == [1, 2, 0]
    assert summary.ignored_pixels == 2
    assert calls == [(1, 2), (2, 2)]


def test_a_single_finding_is_the_message(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", [[0, 1]])
    write_pair(tmp_path, "b", [[0, 40]])
    with pytest.raises(DataError) as caught:
        inspect_samples(pair_samples(tmp_path), CLASSES)
    assert str(caught.value) == (
        f"{tmp_path}/masks/b.png: 1 pixel has the value 40; the 3 classes of classes.json are 0..2 "
        "and 255 is ignored. Add a class, or pass --ignore-index 40."
    )


def test_ten_findings_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    for index in range(12):
        write_pair(tmp_path, f"{index:02d}", [[0, 7]])
    write_pair(tmp_path, "fine", [[0, 1]])
    with pytest.raises(DataError) as caught:
        inspect_samples(pair_samples(tmp_path), CLASSES, workers=1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "12 of 13 pictures cannot be used:"
    assert len(lines) == 12
    assert "masks/00.png: 1 pixel has the value 7" in lines[1]
    assert lines[-1] == "  ... and 2 more"


def test_every_kind_of_finding_names_its_file(tmp_path: Path) -> None:
    write_pair(tmp_path, "broken", [[0]])
    (tmp_path / "images" / "broken.png").write_bytes(b"<html>")
    write_pair(tmp_path, "cut", [[0]])
    (tmp_path / "masks" / "cut.png").write_bytes(b"")
    write_pair(tmp_path, "size", [[0, 1]])
    write_png(tmp_path / "masks" / "size.png", np.zeros((3, 5), np.uint8))
    with pytest.raises(DataError) as caught:
        inspect_samples(pair_samples(tmp_path), CLASSES)
    message = str(caught.value)
    assert "3 of 3 pictures" in message
    assert "images/broken.png: holds an HTML page" in message
    assert "masks/cut.png: is empty" in message
    assert "masks/size.png: is 5x3 pixels, but its image size.png is 2x1" in message


def test_mixed_encodings_are_found(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", [[0, 1]])
    write_pair(tmp_path, "b", [[0, 1]])
    write_pair(tmp_path, "c", [[0]])
    write_png(tmp_path / "masks" / "c.png", np.array([[[2, 100, 0]]], np.uint8))
    message = r"c\.png: read as colours, unlike others \(2 masks as ids and 1 masks as colours\)"
    with pytest.raises(DataError, match=message):
        inspect_samples(pair_samples(tmp_path), CLASSES)


def test_nothing_to_learn_from_is_an_error(tmp_path: Path) -> None:
    write_pair(tmp_path, "a", [[255, 255]])
    with pytest.raises(DataError, match="every pixel of all 1 masks is ignored"):
        inspect_samples(pair_samples(tmp_path), CLASSES)
    with pytest.raises(DataError, match="no picture"):
        inspect_samples([], CLASSES)
