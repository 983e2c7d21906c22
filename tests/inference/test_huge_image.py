from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcnseg.config import PredictConfig
from dcnseg.data.class_map import ClassMap
from dcnseg.data.raster_file import open_raster
from dcnseg.errors import ConfigError, DataError
from dcnseg.inference import huge_image
from dcnseg.inference.huge_image import RasterSummary, is_read_by_windows, predict_raster
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.results import count_shares
from dcnseg.inference.writers import confidence_to_gray, write_prediction
from tests.geotiff import random_bands, write_geotiff
from tests.tiny_network import tiny_predictor

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")

CONFIG = PredictConfig(window=64, overlap=0.3)


def scene(height: int, width: int) -> np.ndarray:
    """Random squares, RGB uint8 [H, W, 3]."""
    return random_bands(3, height, width).transpose(1, 2, 0)


def write(path: Path, image: np.ndarray, **profile: Any) -> Path:
    """Write an image [H, W, C] as a GeoTIFF."""
    return write_geotiff(path, image.transpose(2, 0, 1), **profile)


def predict(
    predictor: Predictor,
    path: Path,
    out: Path,
    kinds: Sequence[str] = ("labels", "confidence", "overlay"),
    **options: Any,
) -> RasterSummary:
    suffixes = {"overlay": "jpg"}
    paths = {kind: out / f"{kind}.{suffixes.get(kind, 'tif')}" for kind in kinds}
    with open_raster(path) as raster:
        return predict_raster(predictor, raster, paths, **options)


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        band: np.ndarray = dataset.read(1)
        return band


@pytest.mark.parametrize(
    ("size_hw", "config", "input_scale"),
    [
        ((150, 170), CONFIG, 1.0),
        ((40, 600), PredictConfig(window=64, overlap=0.6), 1.0),
        ((600, 50), PredictConfig(window=64, overlap=0, flip=True, scales=(0.5, 1)), 1.0),
        ((300, 290), PredictConfig(window=64, min_confidence=0.6), 0.5),
        ((20, 30), PredictConfig(), 1.0),
    ],
)
def test_equals_the_prediction_of_the_whole_image(
    tmp_path: Path, size_hw: tuple[int, int], config: PredictConfig, input_scale: float
) -> None:
    image = scene(*size_hw)
    predictor = tiny_predictor(4, config, input_scale)
    expected = predictor.predict(image, with_confidence=True)
    assert expected.confidence is not None
    path = write(tmp_path / "image.tif", image)
    calls: list[tuple[int, int]] = []
    summary = predict(predictor, path, tmp_path, on_window=lambda *call: calls.append(call))
    np.testing.assert_array_equal(read(tmp_path / "labels.tif"), expected.label_map)
    gray = confidence_to_gray(expected.confidence)
    np.testing.assert_array_equal(read(tmp_path / "confidence.tif"), gray)
    write_prediction(expected, image, {"overlay": tmp_path / "whole.jpg"})
    overlays = [(tmp_path / name).read_bytes() for name in ("overlay.jpg", "whole.jpg")]
    assert overlays[0] == overlays[1]
    assert (summary.share_below, summary.class_shares) == count_shares(expected)
    assert summary.size_hw == size_hw
    assert not summary.is_gray
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))]


def test_groups_of_columns_give_the_same_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = scene(70, 1300)
    predictor = tiny_predictor(5, CONFIG)
    path = write(tmp_path / "image.tif", image)
    calls: list[tuple[int, int]] = []
    predict(predictor, path, tmp_path / "one")
    monkeypatch.setattr(huge_image, "MAX_MAP_BYTES", 1)
    summary = predict(
        predictor, path, tmp_path / "split", on_window=lambda *call: calls.append(call)
    )
    assert len(huge_image._split_columns(predictor, 1300)) == 3
    assert calls == [(i + 1, len(calls)) for i in range(len(calls))]
    for name in ("labels.tif", "confidence.tif"):
        np.testing.assert_array_equal(
            read(tmp_path / "split" / name), read(tmp_path / "one" / name)
        )
    overlays = [(tmp_path / out / "overlay.jpg").read_bytes() for out in ("one", "split")]
    assert overlays[0] == overlays[1]
    expected = count_shares(predictor.predict(image))
    assert (summary.share_below, summary.class_shares) == expected


def test_nodata_is_ignored(tmp_path: Path) -> None:
    """Only valid pixels are counted, and windows without any are not predicted."""
    image = scene(200, 90)
    image[image == 0] = 1
    expected = tiny_predictor(4, CONFIG).predict(image).label_map
    image[:150, :80] = 0
    image[150:, :20] = 0
    predictor = tiny_predictor(4, CONFIG)
    inputs = []
    prepare = predictor.prepare
    predictor.prepare = lambda window: inputs.append(window) or prepare(window)  # type: ignore
    path = write(tmp_path / "image.tif", image, nodata=0)
    summary = predict(predictor, path, tmp_path)
    labels = read(tmp_path / "labels.tif")
    is_valid = image.any(axis=2)
    assert (labels[~is_valid] == 255).all()
    assert (read(tmp_path / "confidence.tif")[~is_valid] == 0).all()
    assert labels[is_valid].max() < 4
    assert (labels[190:, 40:] == expected[190:, 40:]).all()  # far from the nodata
    assert sum(summary.class_shares.values()) == pytest.approx(1, abs=1e-5)
    assert summary.share_below == 0
    assert all(window.any() for window in inputs)
    with rasterio.open(tmp_path / "confidence.tif") as dataset:
        assert dataset.nodata == 0


def test_nodata_is_predicted_if_every_id_is_a_class(tmp_path: Path) -> None:
    predictor = tiny_predictor(2, CONFIG)
    predictor.class_map = ClassMap.from_values([0, 255])
    image = scene(60, 70)
    path = write(tmp_path / "image.tif", image, nodata=int(image[0, 0, 0]))
    predict(predictor, path, tmp_path, ["labels"])
    np.testing.assert_array_equal(read(tmp_path / "labels.tif"), predictor.predict(image).label_map)
    with rasterio.open(tmp_path / "labels.tif") as dataset:
        assert dataset.nodata is None


@pytest.mark.parametrize("kind", ["probabilities", "regions"])
def test_outputs_of_whole_images_are_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "image.tif", scene(60, 70))
    with pytest.raises(ConfigError, match="probabilities, regions and --min-region-score need the"):
        predict(tiny_predictor(2, CONFIG), path, tmp_path / "out", ["labels", kind])
    assert not (tmp_path / "out").exists()


def test_damaged_image_leaves_no_files(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (900, 200, 3), dtype=np.uint8)
    path = write(tmp_path / "image.tif", image, compress="lzw")
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(len(content) - half))
    with pytest.raises(DataError, match=r"image\.tif: cannot be decoded; the file is damaged"):
        predict(tiny_predictor(2, CONFIG), path, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("name", "state", "expected"),
    [
        ("geo.tif", {}, True),
        ("geo.tif", {"needs_whole": True}, False),
        ("geo.tif", {"needs_whole": True, "is_readable": False}, True),
        ("plain.tif", {}, False),
        ("plain.tif", {"has_bands": True}, True),
        ("plain.tif", {"is_readable": False}, True),
        ("text.tif", {"is_readable": False, "has_bands": True}, False),
        ("missing.tif", {"is_readable": False}, False),
        ("photo.png", {}, False),
        ("photo.png", {"is_readable": False}, True),
    ],
)
def test_images_that_are_read_by_windows(
    tmp_path: Path, name: str, state: dict[str, bool], expected: bool
) -> None:
    write(tmp_path / "geo.tif", scene(20, 30))
    Image.fromarray(scene(20, 30)).save(tmp_path / "plain.tif")
    Image.fromarray(scene(20, 30)).save(tmp_path / "photo.png")
    (tmp_path / "text.tif").write_text("no image")
    options = {"is_readable": True, "needs_whole": False, "has_bands": False} | state
    assert is_read_by_windows(tmp_path / name, **options) == expected


def test_images_are_not_read_by_windows_without_rasterio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "geo.tif", scene(20, 30))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert not is_read_by_windows(path, is_readable=True, needs_whole=False, has_bands=False)
    assert not is_read_by_windows(path, is_readable=False, needs_whole=False, has_bands=False)
