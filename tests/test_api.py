"""The public API: what `import dcnseg` offers, and that it agrees with the command line."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dcnseg
from dcnseg import ConfigError, Prediction, Predictor, ShapeError, TrainResult
from dcnseg.config import make_train_config
from dcnseg.data.image_io import as_rgb_array, read_image
from dcnseg.inference.batch import predict_files
from dcnseg.inference.inputs import find_inputs

SMALL: dict[str, Any] = {
    **{"encoder": "resnet18", "encoder_weights": "none", "decoder_channels": 16},
    **{"deform_layers": 1, "crop_size": 32, "batch_size": 2, "epochs": 1, "workers": 0},
}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and masks of 0 and 255."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(6):
        mask = np.zeros((40, 48), np.uint8)
        mask[8:30, 4 * index : 4 * index + 20] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
        image = np.repeat(mask[..., None], 3, axis=2) // 2 + 40
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def result(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return dcnseg.train(photos, tmp_path_factory.mktemp("runs") / "run", **SMALL)


@pytest.fixture(scope="module")
def predictor(result: TrainResult) -> Predictor:
    return result.predictor(device="cpu")


def test_import_is_light_and_all_names_are_there() -> None:
    code = (
        "import sys, dcnseg\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'cv2', 'PIL', 'typer', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert set(dcnseg.__all__) <= set(dir(dcnseg))\n"
        "from dcnseg import *\n"
        "assert callable(train) and callable(Predictor)\n"
        "assert not hasattr(dcnseg, 'no_such_name')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_what_programs_get() -> None:
    tree = ast.parse(Path(dcnseg.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {
        f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == {f"{module}.{name}" for name, module in dcnseg._MODULE_OF.items()}
    assert set(dcnseg._MODULE_OF) == set(dcnseg.__all__)


def test_results_and_scores(result: TrainResult, photos: Path) -> None:
    scores = dcnseg.evaluate(result.run, photos, device="cpu")
    assert scores.to_dict()["class_iou"] == result.class_iou
    assert round(scores.mean_iou, 6) == result.scores["mean_iou"]
    assert set(result.class_iou) == {"background", "foreground"}


def test_a_run_is_resumed_with_changes(result: TrainResult, tmp_path: Path) -> None:
    run = shutil.copytree(result.run, tmp_path / "run")
    dcnseg.resume(run, epochs=2, workers=0)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match=r"model\.encoder"):
        dcnseg.resume(run, encoder="resnet34")


def test_ids_and_overlay_are_those_of_the_files(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    path = photos / "images" / "0.png"
    prediction = predictor.predict(path)
    predict_files(predictor, find_inputs([str(path)]), tmp_path, ("labels", "overlay"))
    with Image.open(tmp_path / "labels" / "0.png") as written:
        np.testing.assert_array_equal(prediction.label_map, np.asarray(written))
    assert set(np.unique(prediction.label_map)) <= {0, 255}
    assert prediction.class_names == {0: "background", 255: "foreground"}
    colors = np.array([prediction.colors[0], prediction.colors[255]], np.uint8)
    expected = colors[(prediction.label_map == 255).astype(int)]
    np.testing.assert_array_equal(prediction.color_mask, expected)
    with Image.open(tmp_path / "overlays" / "0.jpg") as written:
        overlay = prediction.overlay()
        difference = np.abs(np.asarray(written)[: len(overlay)].astype(int) - overlay)
    assert difference.mean() < 4  # JPEG


def test_paths_images_and_arrays_give_the_same(predictor: Predictor, photos: Path) -> None:
    path = photos / "images" / "1.png"
    with Image.open(path) as image:
        given: list[Any] = [path, str(path), image.copy(), np.asarray(image)]
    predictions = predictor.predict_batch(given, with_confidence=True, with_probabilities=True)
    for prediction in predictions:
        np.testing.assert_array_equal(prediction.label_map, predictions[0].label_map)
        assert prediction.confidence is not None
        assert prediction.probabilities is not None
        np.testing.assert_array_equal(prediction.probabilities.max(0), prediction.confidence)


@pytest.mark.parametrize(
    ("array", "suffix"),
    [
        (RNG.integers(0, 256, (9, 7), np.uint8), "png"),
        (RNG.integers(0, 256, (9, 7, 3), np.uint8), "png"),
        (RNG.integers(0, 256, (9, 7, 4), np.uint8), "png"),
        (RNG.integers(0, 2, (9, 7)).astype(bool), "png"),
        (RNG.integers(0, 4000, (9, 7)).astype(np.uint16), "png"),
        (RNG.random((9, 7), np.float32), "tif"),
    ],
    ids=["gray", "RGB", "RGBA", "bool", "gray 16 bit", "float"],
)
def test_arrays_are_converted_as_files_are(array: Any, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(array).save(path)
    np.testing.assert_array_equal(as_rgb_array(array), read_image(path))
    with Image.open(path) as image:
        before = image.tobytes()
        np.testing.assert_array_equal(as_rgb_array(image), read_image(path))
        assert image.tobytes() == before
    if array.ndim == 2:
        np.testing.assert_array_equal(as_rgb_array(array[..., None]), as_rgb_array(array))
    if array.dtype == np.float32:
        np.testing.assert_array_equal(as_rgb_array(array.astype(np.float64)), read_image(path))


def test_16_bit_colors_are_scaled_by_the_range_that_holds_them() -> None:
    array = np.array([[[0, 1023, 4095]]], np.uint16)
    assert as_rgb_array(array).tolist() == [[[0, 64, 255]]]
    transparent = np.array([[[0, 1023, 4095, 0]]], np.uint16)
    assert as_rgb_array(transparent).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 2, 3), np.float32),
        ((2, 2, 2), np.uint8),
        ((1, 2, 2, 3), np.uint8),
        ((0, 2), np.uint8),
        ((2, 2), np.int64),
    ],
)
def test_other_arrays_are_refused(shape: tuple[int, ...], dtype: Any) -> None:
    with pytest.raises(ShapeError, match=r"`image` is .*; expected uint8 or uint16 \[H, W\]"):
        as_rgb_array(np.zeros(shape, dtype))


def test_a_prediction_without_its_image_has_no_overlay(predictor: Predictor) -> None:
    with pytest.raises(ConfigError, match="has no image"):
        Prediction(np.zeros((2, 2), np.uint8), predictor.class_map).overlay()


def test_settings_are_those_of_the_command_line(photos: Path, tmp_path: Path) -> None:
    config = make_train_config({"root": photos, "crop_size": [64, 96], "lr": 1}, "small")
    assert (config.data.crop_size, config.model.encoder, config.lr) == ((64, 96), "resnet18", 1)
    assert config.optimizer == "adamw"  # the preset's
    with pytest.raises(ConfigError, match=r"'encodr' is not a setting .* Did you mean encoder\?"):
        dcnseg.train(photos, tmp_path / "run", encodr="resnet18")
    with pytest.raises(ConfigError, match="--preset is 'smal'"):
        dcnseg.train(photos, tmp_path / "run", preset="smal")
    with pytest.raises(ConfigError, match="is a TrainConfig"):
        dcnseg.train(config, tmp_path / "run", epochs=3)
