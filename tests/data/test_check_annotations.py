"""Checks of JSON annotations: each invalid file or entry is one finding."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcnseg.data.check.report import CheckReport, check_data
from dcnseg.data.dataset import load_label_map
from dcnseg.data.image_io import write_png
from dcnseg.data.pairing.folders import find_pairs, find_splits
from dcnseg.errors import DataError
from tests.data.helpers import check
from tests.data.json_garbage import changed_somewhere, json_text, result_or_message

TRIANGLE = [[1, 1], [30, 1], [30, 30]]
FLAT = [value for point in TRIANGLE for value in point]
NAMES = ("0", "1", "2", "3")


def write_images(root: Path) -> None:
    for index, name in enumerate(NAMES):
        image = np.random.default_rng(index).integers(0, 256, (40, 64, 3), np.uint8)
        write_png(root / f"{name}.png", image)


def labelme() -> dict[str, Any]:
    shapes = [{"label": "cat", "points": TRIANGLE, "shape_type": "polygon"}]
    return {"shapes": shapes, "imageHeight": 40, "imageWidth": 64}


def coco() -> dict[str, Any]:
    return {
        "images": [
            {"id": i, "file_name": f"{name}.png", "height": 40, "width": 64}
            for i, name in enumerate(NAMES)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "segmentation": [FLAT]}
            for i in range(len(NAMES))
        ],
        "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}],
    }


@pytest.fixture
def polygons(tmp_path: Path) -> Path:
    """Four images with a LabelMe file each."""
    write_images(tmp_path)
    for name in NAMES:
        (tmp_path / f"{name}.json").write_text(json.dumps(labelme()))
    return tmp_path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Four images in a COCO file."""
    write_images(tmp_path)
    (tmp_path / "annotations.json").write_text(json.dumps(coco()))
    return tmp_path


def errors(report: CheckReport) -> list[tuple[str, str]]:
    found = [finding for finding in report.findings if finding.severity == "error"]
    return [(Path(finding.file).name, finding.what) for finding in found]


def test_one_bad_labelme_file_does_not_make_the_others_fail(polygons: Path) -> None:
    (polygons / "0.json").write_text("{")
    report = check(polygons)
    assert [file for file, _ in errors(report)] == ["0.json"]
    assert report.mask_modes == {"JSON polygons 0 bit, values": 3}
    assert {entry.name: entry.images for entry in report.classes} == {"background": 3, "cat": 3}


def test_polygons_are_checked_like_masks(polygons: Path) -> None:
    report = check(polygons)
    assert report.is_clean
    assert report.mask_modes == {"JSON polygons 0 bit, values": 4}
    assert {entry.name: entry.images for entry in report.classes} == {"background": 4, "cat": 4}
    [(_, what)] = errors(check(polygons, mask_threshold=128))
    assert "--mask-threshold applies to gray masks, but the masks are polygons" in what
    (polygons / "classes.txt").write_text("background\nstem\n")
    found = errors(check(polygons))
    assert len(found) == 4
    assert "has the label 'cat'" in found[0][1]


@pytest.mark.parametrize(
    "text", ["", "[", "null", "{}", "[]", '{"images": 1}', "[" * 100_000, "9" * 5000, '"\\ud800"']
)
def test_json_of_any_other_kind_is_named_once(polygons: Path, text: str) -> None:
    (polygons / "2.json").write_text(text)
    [(file, what)] = errors(check(polygons))
    assert file == "2.json"
    assert what.startswith(("is not valid JSON", "is neither a LabelMe"))


def test_a_fifo_is_not_an_annotation(polygons: Path) -> None:
    (polygons / "2.json").unlink()
    os.mkfifo(polygons / "2.json")
    assert ("2.png", "has no mask.") in errors(check(polygons))


def test_labels_beside_a_broken_class_list_are_not_blamed(polygons: Path) -> None:
    (polygons / "classes.json").write_text("{")
    assert [file for file, _ in errors(check(polygons))] == ["classes.json"]


def test_too_many_labels_are_one_finding(polygons: Path) -> None:
    many = labelme()
    many["shapes"] = [many["shapes"][0] | {"label": f"c{i}"} for i in range(3000)]
    (polygons / "0.json").write_text(json.dumps(many))
    report = check(polygons)
    [(_, what)] = errors(report)
    assert what.startswith("the polygons have 3002 classes; at most 255 are possible")
    assert report.suggestion.classes is None


def test_each_problem_of_a_coco_file_is_a_finding(listed: Path) -> None:
    content = coco()
    content["categories"] += [{"id": 1, "name": "dog"}, {"id": 2, "name": None}]
    content["annotations"].append({"id": 9, "image_id": 77, "category_id": 1})
    content["annotations"][2]["segmentation"] = []
    (listed / "annotations.json").write_text(json.dumps(content))
    report = check(listed)
    assert sorted(what.partition(":")[0] for _, what in errors(report)) == [
        "'cat' and 'dog'",
        "annotation 9 of image 77",
        "categories[2]",
        "the annotation 2 of 2.png has no segmentation. Add polygons, or remove the annotation.",
    ]
    assert {file for file, _ in errors(report)} == {"annotations.json"}
    assert report.mask_modes == {"JSON polygons 0 bit, values": 3}  # 2.png has none


def test_an_unreadable_coco_file_is_named(listed: Path) -> None:
    (listed / "instances_val.json").write_text("[")
    report = check(listed)
    assert [file for file, _ in errors(report)] == ["instances_val.json"]
    assert sum(report.splits.values()) == len(NAMES)
    with pytest.raises(DataError, match=r"instances_val\.json: is not valid JSON"):
        find_splits(listed)
    (listed / "annotations.json").write_text("[")  # no COCO file is left
    named = {file for file, what in errors(check(listed)) if what.startswith("is not valid JSON")}
    assert named == {"annotations.json", "instances_val.json"}


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_check_takes_can_be_loaded_and_the_rest_is_named(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Whatever the file holds: no other exception, and no other file is blamed."""
    is_coco = data.draw(st.booleans())
    folder = tmp_path / str(len(list(tmp_path.iterdir())))  # new, as COCO files are remembered
    write_images(folder)
    for name in NAMES[1:] if not is_coco else ():
        (folder / f"{name}.json").write_text(json.dumps(labelme()))
    bad = folder / ("annotations.json" if is_coco else "0.json")
    bad.write_bytes(json_text(data.draw(changed_somewhere(coco() if is_coco else labelme()))))
    pairing, message = result_or_message(lambda: find_pairs(folder))
    if pairing is None:
        assert message.startswith(str(bad))
        return
    report = check_data(folder, pairing)
    json.dumps(report.to_dict(), allow_nan=False)
    named = {file for file, _ in errors(report)}
    assert named <= {bad.name, folder.name, *(f"{name}.png" for name in NAMES if is_coco)} | {
        file for file, what in errors(report) if is_coco and what == "has no image."
    }
    if report.class_map:
        for sample in pairing.splits.all_samples():
            load = functools.partial(load_label_map, sample, report.class_map)
            labels, message = result_or_message(load)
            assert labels is not None or bad.name in named, message
