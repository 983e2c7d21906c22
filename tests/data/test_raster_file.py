from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcnseg.data.image_io import read_image
from dcnseg.data.raster_file import (
    can_be_georeferenced,
    check_bands,
    open_raster,
    read_raster_header,
    suggest_rasterio,
)
from dcnseg.errors import ConfigError, DataError
from tests.geotiff import write_geotiff

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (300, 40, 3), dtype=np.uint8)
GRAYS = COLORS[..., 0]


def read(path: Path, *bands: int) -> tuple[np.ndarray, np.ndarray | None]:
    with open_raster(path, bands) as raster:
        height, width = raster.size_hw
        return raster.read(slice(0, height), slice(0, width))


def message(path: Path, *bands: int) -> str:
    with pytest.raises(DataError) as caught:
        read(path, *bands)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("rgb.tif", "RGB", {}),
        ("lzw.tif", "RGB", {"compression": "tiff_lzw"}),
        ("gray.tif", "L", {}),
        ("bits.tif", "1", {}),
        ("palette.tif", "P", {}),
        ("opaque.tif", "RGBA", {}),
        ("rgb.png", "RGB", {}),
        ("palette.png", "P", {}),
        ("rgb.jp2", "RGB", {}),
        ("rgb.jpg", "RGB", {"subsampling": 0}),
        ("gray.jpg", "L", {}),
    ],
)
def test_pixels_equal_those_of_read_image(
    tmp_path: Path, name: str, mode: str, options: dict[str, Any]
) -> None:
    path = tmp_path / name
    Image.fromarray(COLORS).convert(mode).save(path, **options)
    image, is_valid = read(path)
    tolerance = 2 if name.endswith("jpg") else 0  # decoders of JPEG may differ
    np.testing.assert_allclose(image.astype(int), read_image(path).astype(int), atol=tolerance)
    assert is_valid is None or is_valid.all()


@pytest.mark.parametrize(
    "values",
    [
        GRAYS.astype(np.uint16) * 16,  # 12 bits
        GRAYS.astype(np.float32) / 255,
        GRAYS.astype(np.float32) - 100,
        GRAYS.astype(np.int32) * 1000 - 5,
    ],
)
def test_deep_pixels_are_scaled_by_the_range_of_the_whole_image(
    tmp_path: Path, values: np.ndarray
) -> None:
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    expected = read_image(path)
    with open_raster(path) as raster:
        image, _ = raster.read(slice(100, 120), slice(5, 30))
    np.testing.assert_array_equal(image, expected[100:120, 5:30])


def test_selected_bands(tmp_path: Path) -> None:
    bands = RNG.integers(0, 256, (6, 20, 30), dtype=np.uint8)
    path = write_geotiff(tmp_path / "six.tif", bands)
    image, _ = read(path, 6, 1, 3)
    np.testing.assert_array_equal(image, bands[[5, 0, 2]].transpose(1, 2, 0))
    image, _ = read(path, 2, 2, 2)
    assert (image == bands[1][..., None]).all()
    assert "has 6 bands; choose those for red, green and blue, such as --bands 3" in message(path)
    assert "has 6 bands; --bands 1,2,7 needs band 7." in message(path, 1, 2, 7)
    gray = write_geotiff(tmp_path / "gray.tif", bands[:1])
    assert "has 1 band; --bands 1,2,3 needs band 3." in message(gray, 1, 2, 3)
    four, _ = read(write_geotiff(tmp_path / "four.tif", bands[:4], photometric="minisblack"))
    np.testing.assert_array_equal(four, bands[:3].transpose(1, 2, 0))
    assert "has 2 bands; choose" in message(write_geotiff(tmp_path / "two.tif", bands[:2]))


@pytest.mark.parametrize("nodata", [0, -9999.0, float("nan")])
def test_nodata_pixels_are_invalid_and_do_not_change_the_range(
    tmp_path: Path, nodata: float
) -> None:
    values = np.full((3, 10, 12), 0.25, np.float32)
    values[:, 5:] = 1.0
    values[:, 2:4, 3:6] = nodata
    image, is_valid = read(write_geotiff(tmp_path / "holes.tif", values, nodata=nodata))
    assert is_valid is not None
    expected = np.ones((10, 12), bool)
    expected[2:4, 3:6] = False
    np.testing.assert_array_equal(is_valid, expected)
    assert (image[5:] == 255).all()
    assert (image[:2] == 64).all()


def test_image_without_valid_pixels(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "empty.tif", np.full((3, 10, 12), 7, np.uint16), nodata=7)
    _, is_valid = read(path)
    assert is_valid is not None
    assert not is_valid.any()


def test_transparent_pixels_are_blended_with_white(tmp_path: Path) -> None:
    bands = RNG.integers(0, 256, (4, 20, 30), dtype=np.uint8)
    bands[3, :5] = 255
    bands[3, 5:10] = 0
    Image.fromarray(bands.transpose(1, 2, 0)).save(tmp_path / "alpha.tif")
    image, is_valid = read(tmp_path / "alpha.tif")
    expected = read_image(tmp_path / "alpha.tif")
    np.testing.assert_allclose(image.astype(int), expected.astype(int), atol=1)
    assert (image[5:10] == 255).all()
    assert is_valid is not None
    np.testing.assert_array_equal(is_valid, bands[3] > 0)


@pytest.mark.parametrize("name", ["a b.tif", "a?b#c.tif", "zip:x!y.tif", "100%25.tif"])
def test_file_names_are_not_addresses(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_geotiff(tmp_path / "plain.tif", COLORS.transpose(2, 0, 1)).rename(path)
    header = read_raster_header(path)
    assert header is not None
    assert header.size_hw == (300, 40)
    assert header.is_georeferenced


def test_headers(tmp_path: Path) -> None:
    bands = COLORS.transpose(2, 0, 1)
    plain, text, raw = tmp_path / "plain.tif", tmp_path / "text.tif", tmp_path / "x.dng"
    Image.fromarray(COLORS).save(plain)
    text.write_text("no image")
    write_geotiff(raw, bands)
    header = read_raster_header(plain)
    assert header is not None
    assert not header.is_georeferenced
    for path in (text, raw, tmp_path, tmp_path / "missing.tif"):
        assert read_raster_header(path) is None
        assert not can_be_georeferenced(path)
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes(plain.read_bytes()[:9])
    assert read_raster_header(damaged) is None
    point = rasterio.control.GroundControlPoint(1, 2, 50, 60)
    gcps = write_geotiff(
        tmp_path / "gcps.tif", bands, transform=None, crs="EPSG:4326", gcps=[point] * 4
    )
    header = read_raster_header(gcps)
    assert header is not None
    assert header.is_georeferenced
    with open_raster(gcps) as raster:
        assert len(raster.georeference["gcps"]) == 4


def test_pages_and_reduced_copies(tmp_path: Path) -> None:
    path = write_geotiff(tmp_path / "pyramid.tif", COLORS.transpose(2, 0, 1))
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    with open_raster(path) as raster:
        assert not raster.has_more_frames
    pages = [Image.fromarray(COLORS), Image.fromarray(COLORS)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with open_raster(tmp_path / "pages.tif") as raster:
        assert raster.has_more_frames


@pytest.mark.parametrize("name", ["turned.tif", "turned.jpg"])
def test_rotated_image_is_refused(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLORS).save(tmp_path / name, exif=exif)
    assert "has the EXIF orientation 6, which is not supported" in message(tmp_path / name)


def test_unsupported_files(tmp_path: Path) -> None:
    Image.fromarray(COLORS).save(tmp_path / "image.webp")
    text = message(tmp_path / "image.webp")
    assert "cannot be read window by window; expected a TIFF, JPEG 2000, PNG or JPEG" in text
    bands = np.ones((3, 5, 6))
    complex_bands = write_geotiff(tmp_path / "complex.tif", bands.astype(np.complex64))
    assert "has complex numbers; expected integers or floats." in message(complex_bands)
    bands[1, 2, 3] = np.nan
    assert "has NaN or infinite pixel values" in message(write_geotiff(tmp_path / "nan.tif", bands))


@pytest.mark.parametrize("name", ["image.tif", "image.png", "image.jpg", "image.jp2"])
def test_truncated_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    options = {"compression": "tiff_lzw"} if name.endswith("tif") else {}
    Image.fromarray(COLORS).save(path, **options)
    content = path.read_bytes()
    if name.endswith("tif"):  # the header is at the end
        third = len(content) // 3
        path.write_bytes(content[:third] + bytes(third) + content[2 * third :])
    else:
        path.write_bytes(content[: len(content) // 2])
    assert "cannot be decoded; the file is damaged or truncated (" in message(path)


@pytest.mark.parametrize("bands", [(1, 2), (1, 2, 3, 4), (0, 1, 2), (-1, 2, 3)])
def test_wrong_band_numbers(bands: tuple[int, ...]) -> None:
    text = ",".join(map(str, bands))
    with pytest.raises(ConfigError, match=f"--bands is '{text}'; expected the numbers of the"):
        check_bands(bands)


def test_rasterio_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.tif"
    Image.fromarray(COLORS).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="refused") as caught:
        read_image(path)
    assert suggest_rasterio(caught.value) is caught.value
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert str(suggest_rasterio(caught.value)).endswith('pip install "dcnseg[geo]".')
    other = DataError("x: is empty.")
    assert suggest_rasterio(other) is other
    check_bands(())
    with pytest.raises(ConfigError, match=r'--bands needs rasterio.*pip install "dcnseg\[geo\]"'):
        check_bands((1, 2, 3))
    with pytest.raises(ConfigError, match=r"image\.tif: rasterio is not installed"):
        read(path)
