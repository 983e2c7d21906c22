from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from dcnseg.data.check.class_findings import DeclaredClasses, read_declared_classes
from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import load_pair
from dcnseg.data.pairing.folders import find_pairs, find_splits
from dcnseg.data.pairing.splits import Pairing, Splits
from dcnseg.data.polygons.coco_file import read_coco
from dcnseg.data.polygons.drawings import polygon_names, rasterize
from dcnseg.data.polygons.rasters import decode_runs
from dcnseg.data.sample import Sample
from dcnseg.errors import DataError
from tests.data.helpers import check
from tests.data.json_garbage import changed_somewhere, json_text, result_or_message

SIZE_HW = (6, 8)
IDS = {"background": 0, "cat": 1, "dog": 2}
CAT = [[1, 1], [5, 1], [5, 4], [1, 4]]  # columns 1..4, rows 1..3
DOG = [[3, 2], [8, 2], [8, 6], [3, 6]]  # columns 3..7, rows 2..5


def write_image(path: Path, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", SIZE_HW[::-1], (10, 20, 30)).save(path, exif=exif)


def write_labelme(path: Path, shapes: list[dict[str, Any]], **changes: Any) -> None:
    content = {"shapes": shapes, "imageHeight": 6, "imageWidth": 8, "imagePath": "a.jpg"}
    write_json(path, content | changes)


def shape(label: str, points: Any, kind: str = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, **more}


def write_sample(folder: Path, orientation: int = 1) -> Sample:
    """Write an image; return it with the path of its annotation."""
    write_image(folder / "a.jpg", orientation)
    return Sample(folder / "a.jpg", folder / "a.json", "a")


def labelme_mask(tmp_path: Path, *shapes: dict[str, Any], **changes: Any) -> Any:
    sample = write_sample(tmp_path)
    write_labelme(sample.mask, list(shapes), **changes)
    return rasterize(sample, IDS)


def coco_sample(folder: Path, content: dict[str, Any]) -> Sample:
    sample = write_sample(folder)
    write_json(sample.mask, content)
    return sample


def declared_classes(folder: Path, *samples: Sample) -> DeclaredClasses:
    return read_declared_classes(folder, Pairing(Splits(samples)))


def class_map_of(folder: Path) -> ClassMap:
    class_map = check(folder).class_map
    assert class_map is not None
    return class_map


def polygons(*areas: tuple[slice, slice, int]) -> Any:
    expected = np.zeros(SIZE_HW, np.int32)
    for rows, columns, value in areas:
        expected[rows, columns] = value
    return expected


ZEBRA_BELOW_DOG = polygons((slice(1, 4), slice(1, 5), 1), (slice(0, 6), slice(3, 7), 2))


def test_later_polygons_lie_above(tmp_path: Path) -> None:
    mask = labelme_mask(tmp_path, shape("cat", CAT), shape("dog", DOG))
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(
        mask, polygons((slice(1, 4), slice(1, 5), 1), (slice(2, 6), slice(3, 8), 2))
    )
    mask = labelme_mask(tmp_path, shape("dog", DOG), shape("cat", CAT), shape("background", CAT))
    np.testing.assert_array_equal(mask[1:4, 1:5], 0)


def test_rectangles_circles_and_embedded_masks(tmp_path: Path) -> None:
    mask = labelme_mask(tmp_path, shape("cat", [[5, 4], [1, 1]], "rectangle"))
    np.testing.assert_array_equal(mask, polygons((slice(1, 4), slice(1, 5), 1)))
    mask = labelme_mask(tmp_path, shape("cat", [[4, 3], [4, 1.2]], "circle"))
    rows, columns = np.indices(SIZE_HW)
    inside = np.hypot(rows + 0.5 - 3, columns + 0.5 - 4) < 1.8
    np.testing.assert_array_equal(mask, inside.astype(np.int32))
    for corner in ([3, 5], [4, 6]):  # the last pixel, or beyond it
        mask = labelme_mask(tmp_path, square_mask([2, 4], corner))
        np.testing.assert_array_equal(mask, polygons((slice(4, 6), slice(2, 4), 2)))
    mask = labelme_mask(tmp_path, square_mask([7, 4], [8, 5]))  # half of it lies outside
    np.testing.assert_array_equal(mask, polygons((slice(4, 6), slice(7, 8), 2)))
    with pytest.raises(DataError, match=r"a mask of 2x2 pixels, but its box has 1x2"):
        labelme_mask(tmp_path, square_mask([2, 4], [2.5, 5.9]))


def test_shapes_may_reach_beyond_the_image(tmp_path: Path) -> None:
    mask = labelme_mask(tmp_path, shape("cat", [[-5, -5], [50, -5], [50, 2], [-5, 2]]))
    np.testing.assert_array_equal(mask, polygons((slice(0, 2), slice(0, 8), 1)))
    mask = labelme_mask(tmp_path, shape("cat", [[20, 20], [30, 20], [30, 30]]))
    assert mask.sum() == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (shape("bird", CAT), "the label 'bird'; the classes are background, cat, dog"),
        (shape("cat", [[1, 1], [2, 2]], "line"), r"shapes\[0\], a line of 'cat', has no area"),
        (shape("cat", [[1, 1]], "point"), "a point of 'cat', has no area"),
        (shape("cat", [[1, 1], [2, 2]]), "has 2 points; expected at least three"),
        (shape("cat", [[1, 1], [2, 2], [3, 1e300]]), "invalid points; expected pairs of numbers"),
        (shape("cat", [["x", 1], [2, 2], [3, 3]]), "points that are not numbers"),
        (shape("cat", [[1, 1], [2, 2]], "mask", mask="!"), "a mask that cannot be decoded"),
        ({"points": CAT}, "shapes.0. has no label"),
    ],
)
def test_shapes_that_cannot_be_drawn_are_refused(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.json: .*{message}"):
        labelme_mask(tmp_path, bad)


def test_polygons_belong_to_the_image_as_displayed(tmp_path: Path) -> None:
    sample = write_sample(tmp_path, orientation=6)
    write_labelme(sample.mask, [shape("cat", CAT)])
    with pytest.raises(DataError, match=r"for 8x6 pixels, but a.jpg is displayed as 6x8.*EXIF"):
        rasterize(sample, IDS)
    for height, width in ((8, 6), (None, None)):
        write_labelme(sample.mask, [shape("cat", CAT)], imageHeight=height, imageWidth=width)
        assert rasterize(sample, IDS).shape == (8, 6)
    write_labelme(sample.mask, [], imageHeight=-1)
    with pytest.raises(DataError, match="the size 8 x -1; expected positive integers"):
        rasterize(sample, IDS)


def test_pixels_in_no_polygon_need_a_background(tmp_path: Path) -> None:
    sample = write_sample(tmp_path)
    write_labelme(sample.mask, [shape("cat", CAT)])
    with pytest.raises(DataError, match=r"36 pixels of a\.jpg are outside all polygons, and no"):
        rasterize(sample, {"cat": 0, "dog": 1})
    write_labelme(sample.mask, [shape("cat", [[0, 0], [8, 0], [8, 6], [0, 6]])])
    assert (rasterize(sample, {"cat": 3}) == 3).all()


def test_labelme_data_is_read_like_masks(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.jpg")
        write_labelme(tmp_path / f"{name}.json", [shape("dog", DOG), shape("cat", CAT)])
    sample = find_splits(tmp_path).train[0]
    class_map = class_map_of(tmp_path)
    assert class_map.names == ("background", "cat", "dog")
    _, labels = load_pair(sample, class_map)
    assert labels.dtype == np.uint8
    assert np.bincount(labels.ravel()).tolist() == [48 - 12 - 20 + 4, 12, 16]
    entries = [{"id": 7, "name": "dog"}, {"id": 9, "name": "background"}]
    listed = {"classes": entries, "ignore": [{"id": 3, "name": "cat"}]}
    (tmp_path / "classes.json").write_text(json.dumps(listed))
    labels = load_pair(sample, class_map_of(tmp_path))[1]
    assert np.bincount(labels.ravel(), minlength=256)[[0, 1, 255]].tolist() == [16, 20, 12]


def coco_content() -> dict[str, Any]:
    flat = [value for point in CAT for value in point]
    tiny = [0, 0, 1, 0, 1, 0.9]
    runs = {"size": [6, 8], "counts": [18, 24, 6]}  # columns 3..6
    return {
        "images": [
            {"id": 5, "file_name": "a.jpg", "height": 6, "width": 8},
            {"id": 6, "file_name": "sub/b.jpg", "height": 6, "width": 8},
        ],
        "categories": [
            {"id": 0, "name": "animal", "supercategory": "none"},
            {"id": 18, "name": "dog", "supercategory": "animal"},
            {"id": 17, "name": "zebra", "supercategory": "animal"},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 17, "segmentation": [flat, tiny]},
            {"id": 2, "image_id": 5, "category_id": 18, "segmentation": runs, "iscrowd": 1},
        ],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_coco_data_is_read_like_masks(tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.jpg")
    write_image(tmp_path / "images/sub/b.jpg")
    write_json(tmp_path / "annotations.json", coco_content())
    splits = find_splits(tmp_path, val_fraction=0)
    assert [sample.stem for sample in splits.train] == ["a", "sub/b"]
    assert splits.layout == "COCO JSON annotations.json"
    names, problems = polygon_names(sample.mask for sample in splits.train)
    assert (names, problems) == (["background", "zebra", "dog"], [])  # 17 before 18
    class_map = class_map_of(tmp_path)
    labels = load_pair(splits.train[0], class_map)[1]
    np.testing.assert_array_equal(labels, ZEBRA_BELOW_DOG)  # `tiny` holds no center
    assert (load_pair(splits.train[1], class_map)[1] == 0).all()  # listed without annotations


def test_coco_files_of_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        content = coco_content()
        del content["images"][1]
        write_image(tmp_path / f"{split}2017/a.jpg")
        write_json(tmp_path / f"annotations/instances_{split}2017.json", content)
    write_image(tmp_path / "test2017/t.jpg")
    splits = find_splits(tmp_path)
    annotation = tmp_path / "annotations/instances_val2017.json"
    assert splits.val == (Sample(tmp_path / "val2017/a.jpg", annotation, "a"),)
    assert len(splits.train) == 1
    assert splits.layout.endswith("1 images in a split without a COCO file are ignored")


def test_coco_beside_the_images_of_each_split(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        content = coco_content()
        content["images"][1]["file_name"] = f"{split}.jpg"
        write_image(tmp_path / split / "a.jpg")
        write_image(tmp_path / split / f"{split}.jpg")
        write_json(tmp_path / split / "_annotations.coco.json", content)
    splits = find_splits(tmp_path)
    assert [sample.stem for sample in splits.all_samples()] == ["a", "train", "a", "valid"]
    assert len(splits.train) == len(splits.val) == 2


def test_images_that_coco_does_not_list_and_the_reverse(tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.jpg")
    write_image(tmp_path / "images/new.jpg")
    write_json(tmp_path / "annotations.json", coco_content())
    pairing = find_pairs(tmp_path)
    assert pairing.images_without_mask == (tmp_path / "images/new.jpg",)
    assert pairing.masks_without_image == (tmp_path / "annotations.json/sub/b.jpg",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": []}, "annotation 1 of a.jpg has no segmentation"),
        ({"segmentation": [[1, 2, 3]]}, "not a list of coordinates x, y"),
        ({"segmentation": [[1, 2, 3, 4]]}, "has 2 points"),
        ({"category_id": 99}, "category 99, which the file does not list"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, r"size \[8, 6\], not \[6, 8\]"),
        ({"segmentation": {"size": [6, 8], "counts": "X"}}, "end within a number"),
        ({"segmentation": {"size": [6, 8], "counts": [1]}}, "do not add up to 8x6"),
        ({"segmentation": {"size": [6, 8]}}, "has no run lengths"),
    ],
)
def test_damaged_annotations_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = coco_content()
    content["annotations"][0] |= change
    ids = {"background": 0, "zebra": 1, "dog": 2}
    with pytest.raises(DataError, match=rf"a\.json.*{message}"):
        rasterize(coco_sample(tmp_path, content), ids)


def test_polygons_beside_masks_need_a_class_list(tmp_path: Path) -> None:
    sample = write_sample(tmp_path)
    write_labelme(sample.mask, [shape("cat", CAT)])
    other = Sample(tmp_path / "b.jpg", tmp_path / "b.png", "b")
    declared = declared_classes(tmp_path, sample, other)
    assert declared.class_map is None
    assert "b.png: is an image, but other masks are polygons" in str(declared.findings[0])
    declared = declared_classes(tmp_path, sample)
    assert declared.class_map is not None
    assert declared.class_map.ids_by_name == {"background": 0, "cat": 1}


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_is_a_mask_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    labelme = {
        "shapes": [
            shape("cat", CAT),
            shape("dog", [[1, 1], [2, 3]], "circle"),
            square_mask([2, 4], [3, 5]),
        ],
        "imageHeight": 6,
        "imageWidth": 8,
    }
    content = data.draw(changed_somewhere(data.draw(st.sampled_from([labelme, coco_content()]))))
    write_image(tmp_path / "a.jpg")
    # The same time and size of two files would look like one to the cache.
    sample = Sample(tmp_path / "a.jpg", tmp_path / f"{uuid4()}.json", "a")
    sample.mask.write_bytes(json_text(content))
    ids = {"background": 0, "cat": 1, "dog": 2, "zebra": 3}
    mask, message = result_or_message(lambda: rasterize(sample, ids))
    if mask is None:
        assert message.startswith(str(sample.mask))
        assert len(message) < 1500
    else:
        assert mask.shape == SIZE_HW
        assert set(np.unique(mask)) <= {0, 1, 2, 3}
    names, problems = polygon_names([sample.mask])
    assert names[0] == "background"
    assert all(len(problem.what) < 1500 for problem in problems)


def square_mask(*box: Sequence[float]) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), 255).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    return shape("dog", list(box), "mask", mask=text)


def test_a_run_length_near_2_63_is_refused() -> None:
    with pytest.raises(ValueError, match="do not add up to 8x6"):
        decode_runs(SIZE_HW, [2**62, 2**62, 2**62, 2**62 + 48])  # 48 modulo 2^64


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"categories": [{"id": 17, "name": "cat"}]}, "'zebra' and 'cat': two categories have"),
        ({"categories": [{"id": 3, "name": None}]}, r"categories\[3\]: a category needs an"),
        ({"categories": [{"id": "x", "name": "cat"}]}, r"categories\[3\]: a category needs an"),
        ({"categories": [None]}, r"categories\[3\]: a category needs an integer"),
        ({"categories": [{"id": 3, "name": "a\nb"}]}, "a `name` on one line"),
        ({"annotations": [{"id": 9, "image_id": 7}]}, "annotation 9 of image 7: the file does not"),
        ({"annotations": [{"id": 9, "image_id": [7]}]}, r"annotations\[2\]: an annotation needs"),
        ({"annotations": [3]}, r"annotations\[2\]: an annotation needs an `image_id`"),
        ({"images": [{"id": 5, "file_name": "c.jpg"}]}, "a.jpg and c.jpg: two images have the id"),
        ({"images": [{"id": 8, "file_name": None}]}, r"images\[2\]: an image needs"),
        ({"images": [{"id": 8, "file_name": "c.jpg"}]}, "image c.jpg: it has the size None x"),
        ({"images": [[]]}, r"images\[2\]: an image needs an `id` and a `file_name`"),
    ],
)
def test_entries_of_coco_that_cannot_be_used_are_named(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    content = coco_content()
    for name, entries in change.items():
        content[name] += entries
    for name in ("a.jpg", "sub/b.jpg"):
        write_image(tmp_path / name)
    write_json(tmp_path / "annotations.json", content)
    pairing = find_pairs(tmp_path)
    assert len(pairing.splits.all_samples()) == 2
    assert [p.path for p in pairing.problems] == [tmp_path / "annotations.json"]
    assert re.search(problem, pairing.problems[0].what)
    assert not pairing.is_whole
    with pytest.raises(DataError, match=rf"annotations\.json: .*{problem}"):
        find_splits(tmp_path)
    sample = next(s for s in pairing.splits.all_samples() if s.stem == "a")
    class_map = declared_classes(tmp_path, sample).class_map
    assert class_map is not None
    assert class_map.names == ("background", "zebra", "dog")
    with pytest.raises(DataError, match=rf"annotations\.json: .*{problem}"):
        load_pair(sample, class_map)
    np.testing.assert_array_equal(rasterize(sample, class_map.ids_by_name), ZEBRA_BELOW_DOG)


def test_many_entries_with_one_problem_are_one_sentence(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] += [{"id": i, "image_id": 7} for i in range(1000)]
    write_json(tmp_path / "a.json", content)
    coco = read_coco(tmp_path / "a.json")
    assert len(coco.problems) == 1
    assert coco.problems[0].startswith("annotation 0 of image 7, annotation 1 of image 7, ")
    assert " and 995 more: the file does not list this image." in coco.problems[0]


def test_ids_may_be_written_as_texts_or_floats(tmp_path: Path) -> None:
    content = coco_content()
    content["images"][0]["id"] = "five"
    for annotation in content["annotations"]:
        annotation |= {"image_id": "five", "category_id": float(annotation["category_id"])}
    content["categories"][2]["id"] = "17"
    mask = rasterize(coco_sample(tmp_path, content), {"zebra": 1, "dog": 2, "bg": 0})
    assert set(np.unique(mask)) == {0, 1, 2}


def test_all_shapes_that_cannot_be_drawn_are_counted(tmp_path: Path) -> None:
    bad = shape("cat", [[1, 1]], "point")
    with pytest.raises(DataError, match="The same image has 2 more shapes that cannot be drawn"):
        labelme_mask(tmp_path, bad, shape("dog", DOG), bad, {"points": CAT})
