from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from dcnseg.errors import ConfigError, DataError
from dcnseg.inference.batch import predict_files
from dcnseg.inference.inputs import find_inputs
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.region_files import encode_mask, to_coco_results
from dcnseg.inference.remote_files import AnyPath
from dcnseg.inference.results import FileResult
from tests.region_network import CLASSES, build_region_predictor, make_image

# pycocotools decodes with what numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKGROUND = "b.png"  # the name of an image without regions


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """The network with a region head; it sees only background in black images."""
    predictor = build_region_predictor()
    predict = predictor.predict

    def predict_background(image: np.ndarray, **options: bool) -> Prediction:
        prediction = predict(image, **options)
        if image.any():
            return prediction
        numbers = np.zeros(image.shape[:2], np.int32)
        labels = np.zeros(image.shape[:2], np.uint8)
        return Prediction(labels, CLASSES, image=image, regions=(), region_numbers=numbers)

    monkeypatch.setattr(predictor, "predict", predict_background)
    return predictor


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three images of different sizes; the second has no regions."""
    paths = [tmp_path / "in" / name for name in ("a.png", BACKGROUND, "c.png")]
    paths[0].parent.mkdir()
    for seed, (path, size) in enumerate(zip(paths, [(96, 160), (70, 90), (64, 80)], strict=True)):
        image = make_image(*size, seed) * (path.name != BACKGROUND)
        Image.fromarray(image).save(path)
    return paths


def predict(
    predictor: Predictor, paths: list[Path], out: Path, *, skip_existing: bool = False
) -> list[FileResult]:
    inputs = find_inputs(list(map(str, paths)))
    return predict_files(predictor, inputs, out, ("regions",), skip_existing=skip_existing)


def read(path: AnyPath) -> Any:
    return json.loads(path.read_bytes())


MASKS = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda hw: arrays(bool, hw))


@given(MASKS, st.tuples(*[st.integers(0, 3)] * 4))
@example(np.ones((3, 4), bool), (0, 0, 0, 0))  # a single run, to the last pixel
@example(np.ones((3, 4), bool), (0, 0, 2, 1))  # columns of the image's height are one run
@example(np.array([[0, 1], [1, 0]], bool), (0, 0, 1, 1))
@example(np.array([[0, 1], [1, 1]], bool), (0, 0, 0, 0))
@example(np.ones((1, 1), bool), (0, 0, 0, 0))
@example(np.ones((1, 1), bool), (3, 3, 3, 3))
@example(np.zeros((2, 2), bool), (0, 1, 0, 1))
def test_run_lengths_are_those_of_pycocotools(
    mask: np.ndarray, border: tuple[int, int, int, int]
) -> None:
    top, bottom, left, right = border
    full = np.pad(mask, ((top, bottom), (left, right)))
    expected = coco_mask.encode(np.asfortranarray(full.astype(np.uint8)))
    encoded = encode_mask(mask, (top, left), full.shape)
    assert encoded["counts"] == expected["counts"].decode()
    assert encoded["size"] == expected["size"] == list(full.shape)
    assert json.loads(json.dumps(encoded)) == encoded


def test_results_of_an_image(predictor: Predictor, images: list[Path]) -> None:
    prediction = predictor.predict(make_image(96, 160), regions=True)
    results = json.loads(json.dumps(to_coco_results(prediction, 5)))
    assert prediction.regions
    assert {entry["category_id"] for entry in results} == {7, 3}  # not the training indices
    for index, (entry, region) in enumerate(zip(results, prediction.regions, strict=True)):
        mask = prediction.region_mask(index)
        assert (coco_mask.decode(entry["segmentation"]) == mask).all()
        assert entry["area"] == coco_mask.area(entry["segmentation"]) == mask.sum()
        assert entry["bbox"] == coco_mask.toBbox(entry["segmentation"]).tolist()
        assert entry["image_id"] == 5
        assert entry["category_id"] == CLASSES.ids[region.class_index]
        assert entry["score"] == pytest.approx(region.score, abs=1e-5)
        assert entry["confidence"] == pytest.approx(region.confidence, abs=1e-5)
        assert entry["voted_score"] == pytest.approx(region.voted_score, abs=1e-5)
        left, top, width, height = entry["refined_bbox"]
        refined = (left, top, left + width, top + height)
        assert refined == pytest.approx(region.refined_box_xyxy, abs=0.02)
        voted = None if region.voted_index is None else CLASSES.ids[region.voted_index]
        assert entry["voted_category_id"] == voted
    with pytest.raises(ConfigError, match="no regions; call predict with regions=True"):
        to_coco_results(predictor.predict(make_image(9, 9)), 1)


@pytest.mark.parametrize("names", [["a.png", "b.png", "c.png"], ["b.png"]])
def test_pycocotools_reads_the_files(
    predictor: Predictor, images: list[Path], tmp_path: Path, names: list[str]
) -> None:
    paths = [path for path in images if path.name in names]
    results = predict(predictor, paths, tmp_path / "out")
    merged = COCO(tmp_path / "out" / "regions.json")
    assert [image["file_name"] for image in merged.dataset["images"]] == list(map(str, paths))
    assert merged.getCatIds() == [0, 7, 3]
    assert [c["name"] for c in merged.loadCats(merged.getCatIds())] == ["background", "car", "tree"]
    for image_id, (path, result) in enumerate(zip(paths, results, strict=True), 1):
        prediction = predictor.predict(np.asarray(Image.open(path)), regions=True)
        assert prediction.regions is not None
        (image,) = merged.loadImgs(image_id)
        assert (image["height"], image["width"]) == prediction.labels.shape
        of_image = merged.loadAnns(merged.getAnnIds(imgIds=image_id))
        assert len(of_image) == len(prediction.regions)
        assert bool(of_image) == (path.name != BACKGROUND)
        for index, annotation in enumerate(of_image):
            assert (merged.annToMask(annotation) == prediction.region_mask(index)).all()
            assert annotation["iscrowd"] == 0
        if of_image:
            loaded = merged.loadRes(str(result.outputs["regions"]))
            assert len(loaded.anns) == len(of_image)
        else:
            assert read(Path(str(result.outputs["regions"]))) == []
    ids = [annotation["id"] for annotation in merged.dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    assert bool(ids) == (len(names) > 1)


def test_an_image_that_fails_keeps_its_id_free(
    predictor: Predictor, images: list[Path], tmp_path: Path
) -> None:
    images[0].write_bytes(b"no image")
    results = predict(predictor, images, tmp_path / "out")
    assert [result.error is None for result in results] == [False, True, True]
    merged = read(tmp_path / "out" / "regions.json")
    assert [image["id"] for image in merged["images"]] == [2, 3]
    assert {annotation["image_id"] for annotation in merged["annotations"]} == {3}
    assert {entry["image_id"] for entry in read(Path(str(results[2].outputs["regions"])))} == {3}


def test_skipped_images_keep_their_regions(
    predictor: Predictor, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also an image without regions; what is left to do is predicted."""
    out = tmp_path / "out"
    predict(predictor, images, out)
    before = (out / "regions.json").read_bytes()
    (out / "regions" / "c.json").unlink()
    results = predict(predictor, images, out, skip_existing=True)
    assert [result.is_skipped for result in results] == [True, True, False]
    assert (out / "regions.json").read_bytes() == before
    (out / "regions.json").unlink()
    monkeypatch.setattr(predictor, "predict", None)
    predict(predictor, images, out, skip_existing=True)
    assert (out / "regions.json").read_bytes() == before


def test_files_of_a_call_with_other_images_get_new_ids(
    predictor: Predictor, images: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict(predictor, images[2:], out)
    assert {entry["image_id"] for entry in read(out / "regions" / "c.json")} == {1}
    predict(predictor, images, out, skip_existing=True)
    assert {entry["image_id"] for entry in read(out / "regions" / "c.json")} == {3}
    merged = read(out / "regions.json")
    assert {annotation["image_id"] for annotation in merged["annotations"]} == {1, 3}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "{}",
        lambda text: "[1]",
        lambda text: "[{}]",
        lambda text: text.replace('"bbox"', '"box"'),
        lambda text: text.replace('"size"', '"sizes"'),
        lambda text: text.replace('"segmentation": {', '"segmentation": [{').replace("}, ", "}], "),
    ],
)
def test_a_damaged_file_of_an_earlier_call_is_named(
    predictor: Predictor, images: list[Path], tmp_path: Path, damage: Callable[[str], str]
) -> None:
    out = tmp_path / "out"
    predict(predictor, images, out)
    before = (out / "regions.json").read_bytes()
    path = out / "regions" / "a.json"
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.raises(DataError) as caught:
        predict(predictor, images, out, skip_existing=True)
    assert str(caught.value).startswith(f"{path}: is not a file of regions (")
    assert str(caught.value).endswith("Delete it, and predict its image again.")
    assert (out / "regions.json").read_bytes() == before


def test_files_are_written_atomically(
    predictor: Predictor, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    predict(predictor, images, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write_text = Path.write_text

    def write_half(path: Path, text: str, **options: Any) -> int:
        write_text(path, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        predict(predictor, images, out)
    with pytest.raises(OSError, match="No space left"):
        predict(predictor, images, out, skip_existing=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_file_of_the_user_is_not_overwritten(
    predictor: Predictor, images: list[Path], tmp_path: Path
) -> None:
    """The output folder is a folder of images, which is not marked as output."""
    out = images[0].parent
    (out / "regions.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"regions\.json exists and was not written by dcnseg"):
        predict(predictor, images, out)
    assert (out / "regions.json").read_text() == "mine"
    assert not (out / "regions").exists()
    (out / "regions.json").unlink()
    for _ in range(2):
        predict(predictor, images, out)
    assert len(read(out / "regions.json")["images"]) == 3
