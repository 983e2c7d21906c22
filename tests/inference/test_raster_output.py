from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.raster_file import open_raster
from dcnseg.inference import raster_output
from dcnseg.inference.raster_output import RasterOutputs, Strip
from tests.geotiff import CRS, TRANSFORM, random_bands, write_geotiff

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")

CLASSES = ClassMap.from_values(range(4))
NAMES = {"labels": "labels.tif", "confidence": "confidence.tif", "overlay": "overlay.jpg"}


def write(
    image: Path, labels: np.ndarray, out: Path, class_map: ClassMap = CLASSES, rows: int = 50
) -> RasterOutputs:
    """Write the outputs of an image with these labels, with a confidence of 0.5."""
    height, width = labels.shape
    with open_raster(image) as raster, ExitStack() as files:
        outputs = RasterOutputs(files, raster, class_map, {k: out / v for k, v in NAMES.items()})
        outputs.start_columns(slice(0, width))
        for top in range(0, height, rows):
            part = labels[top : top + rows]
            pixels, is_valid = raster.read(slice(top, top + len(part)), slice(0, width))
            outputs.add(Strip(part, np.full(part.shape, 0.5, np.float16), pixels, is_valid))
        outputs.finish_columns()
        outputs.write_overlay(out / NAMES["overlay"], 0.5)
    return outputs


def random_labels(height: int = 60, width: int = 70) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4, (height, width), dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        band: np.ndarray = dataset.read(1)
        return band


@pytest.mark.parametrize("rows", [1, 300, 512, 700, 1300])
def test_strips_of_any_height(tmp_path: Path, rows: int) -> None:
    image = write_geotiff(tmp_path / "image.tif", random_bands(3, 1300, 30))
    labels = random_labels(1300, 30)
    outputs = write(image, labels, tmp_path, rows=rows)
    np.testing.assert_array_equal(read(tmp_path / "labels.tif"), labels)
    assert (read(tmp_path / "confidence.tif") == 128).all()
    np.testing.assert_array_equal(outputs.counts.of_index[:4], np.bincount(labels.ravel()))


def test_metadata(tmp_path: Path) -> None:
    names = ("road & <rail>", "é", "x y", "x" * 300)
    class_map = ClassMap(tuple(ClassInfo(i, name, (i, 9, 8)) for i, name in enumerate(names)))
    image = write_geotiff(tmp_path / "image.tif", random_bands(3))
    write(image, random_labels(), tmp_path, class_map)
    with rasterio.open(tmp_path / "labels.tif") as dataset:
        assert dataset.crs == CRS
        assert tuple(dataset.transform)[:6] == TRANSFORM
        assert dataset.nodata == 255
        assert dataset.dtypes == ("uint8",)
        assert dataset.block_shapes == [(512, 512)]
        assert dataset.compression.value == "DEFLATE"
        assert dataset.descriptions == ("class id",)
        assert dataset.tags(1) == {f"class_{i}": name for i, name in enumerate(names)}
        colors = [color[:3] for _, color in sorted(dataset.colormap(1).items())]
        np.testing.assert_array_equal(colors, class_map.palette())
    with rasterio.open(tmp_path / "confidence.tif") as dataset:
        assert tuple(dataset.transform)[:6] == TRANSFORM
        assert dataset.nodata is None
        assert dataset.descriptions == ("probability of the class times 255",)
    assert {path.name for path in tmp_path.iterdir()} == {"image.tif", *NAMES.values()}


def test_control_points(tmp_path: Path) -> None:
    point = rasterio.control.GroundControlPoint(1, 2, 50, 60)
    layout = {"transform": None, "crs": "EPSG:4326", "gcps": [point] * 4}
    write(
        write_geotiff(tmp_path / "image.tif", random_bands(3), **layout), random_labels(), tmp_path
    )
    with rasterio.open(tmp_path / "labels.tif") as dataset:
        points, crs = dataset.gcps
    assert crs == "EPSG:4326"
    assert [(p.row, p.col, p.x, p.y) for p in points] == [(1, 2, 50, 60)] * 4


def test_image_without_georeference(tmp_path: Path) -> None:
    Image.new("RGB", (70, 60)).save(tmp_path / "image.tif")
    write(tmp_path / "image.tif", random_labels(), tmp_path)
    with Image.open(tmp_path / "labels.tif") as file:  # rasterio would warn
        np.testing.assert_array_equal(np.asarray(file), random_labels())


def test_ids_above_255(tmp_path: Path) -> None:
    class_map = ClassMap.from_values([3, 7, 300, 301])
    image = write_geotiff(tmp_path / "image.tif", random_bands(3))
    write(image, random_labels(), tmp_path, class_map)
    labels = read(tmp_path / "labels.tif")
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, np.array([3, 7, 300, 301])[random_labels()])


def test_large_overlay_is_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By 8: the image by its mean, the labels by one of the pixels."""
    monkeypatch.setattr(raster_output, "MAX_OVERLAY_SIDE", 100)
    image = np.zeros((3, 530, 630), np.uint8)
    image[:, :, ::2] = 200
    labels = np.zeros((530, 630), np.uint8)
    labels[265:] = 1
    class_map = ClassMap.binary(1)
    outputs = write(write_geotiff(tmp_path / "image.tif", image), labels, tmp_path, class_map)
    assert outputs.counts.is_gray
    with Image.open(tmp_path / "overlay.jpg") as file:
        assert file.width == 79
        assert file.height > 67  # with a legend
        overlay = np.asarray(file)[:67].astype(int)
    np.testing.assert_allclose(overlay[:28, :76], 100, atol=4)
    assert (np.ptp(overlay[34:], axis=2).mean(axis=1) > 20).all()  # tinted


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
