from __future__ import annotations

import json
import signal
import subprocess
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
from dcnseg.inference import huge_image, raster_output
from dcnseg.inference.huge_image import RasterSummary, is_read_by_windows, predict_raster
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.results import count_shares
from dcnseg.inference.writers import confidence_to_gray, write_prediction
from tests.tiny_network import tiny_predictor

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")

ORIGIN = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_000_000)
CONFIG = PredictConfig(window=64, overlap=0.3)


def scene(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random squares, RGB uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    squares = rng.integers(0, 256, (-(-height // 7), -(-width // 7), 3), dtype=np.uint8)
    return squares.repeat(7, axis=0).repeat(7, axis=1)[:height, :width]


def write(path: Path, image: np.ndarray, **profile: Any) -> Path:
    """Write an image [H, W, C] as a tiled GeoTIFF."""
    height, width, count = image.shape
    layout = {"crs": "EPSG:32632", "transform": ORIGIN, "tiled": True} | profile
    size = {"height": height, "width": width, "count": count, "dtype": image.dtype}
    with rasterio.open(path, "w", driver="GTiff", **size, **layout) as dataset:
        dataset.write(image.transpose(2, 0, 1))
    return path


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


def test_metadata_of_the_label_map(tmp_path: Path) -> None:
    predictor = tiny_predictor(3, CONFIG)
    predict(predictor, write(tmp_path / "image.tif", scene(60, 70)), tmp_path)
    with rasterio.open(tmp_path / "labels.tif") as dataset:
        assert dataset.crs == "EPSG:32632"
        assert dataset.transform == ORIGIN
        assert dataset.nodata == 255
        assert dataset.dtypes == ("uint8",)
        assert dataset.block_shapes == [(512, 512)]
        assert dataset.compression.value == "DEFLATE"
        assert dataset.descriptions == ("class id",)
        tags = {f"class_{i}": name for i, name in enumerate(predictor.class_map.names)}
        assert dataset.tags(1) == tags
        palette = predictor.class_map.palette()
        colors = [color[:3] for _, color in sorted(dataset.colormap(1).items())]
        np.testing.assert_array_equal(colors, palette)
    with rasterio.open(tmp_path / "confidence.tif") as dataset:
        assert dataset.transform == ORIGIN
        assert dataset.nodata is None
    assert {path.name for path in tmp_path.iterdir()} == {
        *("image.tif", "labels.tif", "confidence.tif", "overlay.jpg")
    }


def test_ids_above_255(tmp_path: Path) -> None:
    predictor = tiny_predictor(2, CONFIG)
    predictor.class_map = ClassMap.from_values([7, 300])
    image = scene(60, 70)
    predict(predictor, write(tmp_path / "image.tif", image), tmp_path, ["labels"])
    labels = read(tmp_path / "labels.tif")
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, predictor.predict(image).label_map)


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


def test_large_overlay_is_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster_output, "MAX_OVERLAY_SIDE", 100)
    image = np.zeros((530, 630, 3), np.uint8)
    image[:, ::2] = 200  # the mean is 100
    predictor = tiny_predictor(2, PredictConfig(window=512))
    predictor.class_map = ClassMap.from_values([0, 1]).binary(1)
    path = write(tmp_path / "image.tif", image)
    summary = predict(predictor, path, tmp_path, ["overlay"], opacity=0)
    with Image.open(tmp_path / "overlay.jpg") as overlay:
        assert overlay.width == 79
        assert 67 < overlay.height < 120  # with a legend
        pixels = np.asarray(overlay)[20:60, 20:60]
    if set(summary.class_shares) == {"background"}:
        np.testing.assert_allclose(pixels, 100, atol=5)
    assert summary.is_gray


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


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of the size of a file")
def test_write_errors_are_reported() -> None:
    """At each size at which the disk is full: in the pixels, the color table or the tags."""
    code = """
import json, os, resource, signal, sys, tempfile
from contextlib import ExitStack
from pathlib import Path
import numpy as np
from dcnseg.data.class_map import ClassMap
from dcnseg.data.raster_file import open_raster
from dcnseg.inference.raster_output import RasterOutputs, Strip, explain_write_errors
from PIL import Image
folder = Path(tempfile.mkdtemp())
Image.new("RGB", (500, 500)).save(folder / "image.tif")
labels = np.random.default_rng(0).integers(0, 4, (500, 500), dtype=np.uint8)
strip = Strip(labels, np.ones((500, 500), np.float16), np.zeros((500, 500, 3), np.uint8), None)
path, found = folder / "labels.tif", []
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def write(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with open_raster(folder / "image.tif") as raster:
        with explain_write_errors(folder), ExitStack() as files:
            outputs = RasterOutputs(files, raster, ClassMap.from_values(range(4)), {"labels": path})
            outputs.start_columns(slice(0, 500))
            outputs.add(strip)
            outputs.finish_columns()

write(resource.RLIM_INFINITY)
size = path.stat().st_size
path.unlink()
for limit in (8, 1000, 20000, size - 3000, size - 100, size - 1):
    try:
        write(limit)
        found.append("written")
    except OSError as error:
        found.append("reported" if "cannot be written" in str(error) else repr(error))
    found.append(path.exists())
print(json.dumps(found))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(process.stdout) == ["reported", False] * 6


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
