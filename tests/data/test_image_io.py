from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image, TiffImagePlugin

from dcnseg.data.image_io import (
    read_header,
    read_image,
    read_mask,
    read_size,
    write_jpeg,
    write_png,
)
from dcnseg.errors import DataError, ShapeError

IDS = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
COLORS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10


def save(path: Path, array: npt.NDArray[np.generic]) -> Path:
    Image.fromarray(array).save(path)
    return path


def mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def gray_png(rows: list[bytes], width: int, bit_depth: int) -> bytes:
    """A gray PNG with fewer than 8 bits per pixel, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, len(rows), bit_depth, 0, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", content), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


DEEP = np.array([[0, 300], [65535, 11]], np.uint16)


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        *((f"mask{suffix}", IDS, IDS) for suffix in (".png", ".bmp", ".tif", ".PNG")),
        *((f"mask{suffix}", DEEP, DEEP) for suffix in (".png", ".tif")),
        ("bits.png", IDS > 1, IDS > 1),
        ("whole.tif", IDS.astype(np.float32), IDS),
        ("rgb.png", COLORS, COLORS),
        ("rgba.png", np.dstack([COLORS, np.full((2, 3), 7, np.uint8)]), COLORS),
        ("kkk.png", np.dstack([IDS] * 3), np.dstack([IDS] * 3)),
        ("la.png", np.dstack([IDS, np.full((2, 3), 255, np.uint8)]), IDS),
    ],
)
def test_masks_keep_ids_and_colors(
    tmp_path: Path, name: str, array: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]
) -> None:
    mask = read_mask(save(tmp_path / name, array))
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == (np.int32 if mask.ndim == 2 else np.uint8)


def test_2_and_4_bit_masks_keep_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(gray_png([bytes([0b00011011])], 4, 2))
    assert read_mask(path).tolist() == [[0, 1, 2, 3]]
    path.write_bytes(gray_png([bytes([0x0B, 0xF1])], 4, 4))
    assert read_mask(path).tolist() == [[0, 11, 15, 1]]


def test_palette_mask_gives_indices_not_colors(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    palette = np.array([[200, 10, 10], [10, 200, 10], [0, 0, 0], [255, 255, 255]], np.uint8)
    write_png(path, IDS, palette)
    assert mode(path) == "P"
    np.testing.assert_array_equal(read_mask(path), IDS)
    np.testing.assert_array_equal(read_image(path), palette[IDS])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mask_in_the_alpha_channel_alone_is_read_from_it(tmp_path: Path, channels: int) -> None:
    ground = np.full((2, 3, channels), 9, np.uint8)
    polygons = np.dstack([ground, IDS * 80])
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", polygons)), IDS * 80)
    empty = np.dstack([ground, IDS * 0])  # nothing is drawn on this one
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", empty)), IDS * 0)


def test_16_bit_channels_of_masks_keep_their_ids(tmp_path: Path) -> None:
    ids = np.array([[0, 7, 300]], np.uint16)
    cv2.imwrite(str(tmp_path / "kkk.png"), np.repeat(ids[..., None], 3, axis=2))
    assert read_mask(tmp_path / "kkk.png").tolist() == [[0, 7, 300]]
    deep = COLORS.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "rgb.png"), deep[..., ::-1])
    np.testing.assert_array_equal(read_mask(tmp_path / "rgb.png"), COLORS)
    cv2.imwrite(str(tmp_path / "rgb.png"), deep[..., ::-1] + 1)
    with pytest.raises(DataError, match=r"rgb\.png: has 16-bit colors that do not fit in 8 bits"):
        read_mask(tmp_path / "rgb.png")


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_float_masks_need_integers(tmp_path: Path, value: float) -> None:
    with pytest.raises(DataError, match=r"part\.tif: .* not integers"):
        read_mask(save(tmp_path / "part.tif", np.full((2, 2), value, np.float32)))


def test_image_modes_look_alike(tmp_path: Path) -> None:
    gray = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    expected = np.repeat(gray[..., None], 3, axis=2)
    images = {
        "l.png": Image.fromarray(gray),
        "la.png": Image.fromarray(gray).convert("LA"),
        "rgba.png": Image.fromarray(expected).convert("RGBA"),
        "deep.png": Image.fromarray(gray.astype(np.uint16) * 257),
        "deep.tif": Image.fromarray(gray.astype(np.uint16) * 257),
        "float.tif": Image.fromarray(gray.astype(np.float32) / 255),
        "p.png": Image.fromarray(gray).convert("P"),
        "cmyk.tif": Image.fromarray(expected).convert("CMYK"),
        "rgb.bmp": Image.fromarray(expected),
        "rgb.ppm": Image.fromarray(expected),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
        rgb = read_image(tmp_path / name)
        assert rgb.dtype == np.uint8
        np.testing.assert_array_equal(rgb, expected, err_msg=name)
        assert rgb.flags.writeable
        assert read_size(tmp_path / name) == (8, 8)
    Image.fromarray(expected).save(tmp_path / "x.webp", lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "x.webp"), expected)
    assert read_image(save(tmp_path / "1.png", gray > 99)).max() == 255


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    rgb = read_image(save(tmp_path / "a.png", rgba))
    assert rgb.tolist() == [[[200, 0, 0], [255, 255, 255], [127, 127, 127]]]
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    keyed.save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert read_image(tmp_path / "key.png").tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_by_the_range_that_holds_them(tmp_path: Path, top: float) -> None:
    values = np.array([[0, 0.5, 0.8]], np.float32) * top
    rgb = read_image(save(tmp_path / "a.tif", values))
    assert rgb[0, :, 0].tolist() == [0, 128, 204]


def test_other_values_are_scaled_by_their_least_and_greatest(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", np.array([[-300, 0, 300]], np.float32))
    assert read_image(path)[0, :, 0].tolist() == [0, 128, 255]
    path = save(tmp_path / "a.tif", np.array([[-300, 0, 300]], np.int32))
    assert read_image(path)[0, :, 1].tolist() == [0, 128, 255]
    assert read_image(save(tmp_path / "a.tif", np.full((1, 2), -3.5, np.float32))).max() == 0
    with pytest.raises(DataError, match=r"a\.tif: has NaN or infinite pixel values"):
        read_image(save(tmp_path / "a.tif", np.array([[0, np.nan]], np.float32)))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_images_of_less_depth_are_not_dark(tmp_path: Path, bits: int) -> None:
    deep = (np.array([[0, 0.5, 1]]) * (2**bits - 1)).round().astype(np.uint16)
    gray = read_image(save(tmp_path / "gray.png", deep))
    np.testing.assert_allclose(gray[0, :, 0], [0, 128, 255], atol=1)
    cv2.imwrite(str(tmp_path / "rgb.png"), np.repeat(deep[..., None], 3, axis=2))
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), gray)


def test_16_bit_colors_keep_channels_alpha_and_rotation(tmp_path: Path) -> None:
    rgba = np.array([[[255, 0, 0, 255]], [[0, 99, 0, 0]]], np.uint16) * 257
    cv2.imwrite(str(tmp_path / "a.png"), rgba[..., [2, 1, 0, 3]])
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 0, 0]], [[255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 200  # a light corner, above left as displayed
    stored = upright.T if orientation > 4 else upright
    stored = stored[:, ::-1] if orientation in (2, 3, 7, 8) else stored
    stored = stored[::-1] if orientation in (3, 4, 6, 7) else stored
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert read_size(path) == (16, 32)
    np.testing.assert_allclose(read_image(path)[..., 0].astype(int), upright, atol=20)
    np.testing.assert_allclose(read_mask(path), upright, atol=20)


def jpeg_bytes() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


BROKEN = [
    ("empty.jpg", b"", "is empty"),
    ("cut.jpg", jpeg_bytes()[:2000], "damaged or truncated"),
    ("cut.png", gray_png([bytes(range(60))] * 9, 60, 8)[:70], "damaged or truncated"),
    ("page.jpg", b"\n<!DOCTYPE html><html>404</html>", "HTML page"),
    ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
    ("text.png", b"hello", "not an image in a supported format"),
    ("bomb.png", gray_png([b""], 2_000_000_000, 8), "refused, Image size"),
]


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000"])
def test_files_cut_off_in_their_header_are_called_so(tmp_path: Path, file_format: str) -> None:
    whole = io.BytesIO()
    Image.fromarray(COLORS).save(whole, file_format)
    for length in (12, 20, 30):
        path = tmp_path / f"cut{length}"
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises(DataError, match="the file is damaged or truncated"):
            read_image(path)


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[row[0] for row in BROKEN])
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_image, read_mask, read_size):
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_image, read_mask, read_size, read_header])
def test_what_is_no_regular_file_is_named_and_not_waited_for(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    with pytest.raises(DataError, match=r"none\.png: does not exist\."):
        read(tmp_path / "none.png")
    for name in ("x.png", "x.jpg", "x.tif"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: is not a regular file but a folder, FIFO"):
            read(tmp_path / name)
    with pytest.raises(DataError, match="is not a regular file but a folder"):
        read(tmp_path)


def test_the_content_decides_not_the_ending(tmp_path: Path) -> None:
    Image.fromarray(COLORS).save(tmp_path / "really_png.jpg", "PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "really_png.jpg"), COLORS)


def multiband_tiff(bands: int, bits: int, photometric: int) -> bytes:
    """A TIFF of 2x2 pixels without values; Pillow writes none of more than four bands."""
    bits_value = 200 if bands > 2 else bits * (65537 if bands == 2 else 1)
    size = 4 * bands * bits // 8
    tags = [
        *((256, 3, 1, 2), (257, 3, 1, 2), (258, 3, bands, bits_value), (259, 3, 1, 1)),
        *((262, 3, 1, photometric), (273, 4, 1, 300), (277, 3, 1, bands), (278, 3, 1, 2)),
        (279, 4, 1, size),
    ]
    if bands > 3:
        tags.append((338, 3, bands - 3, 260 if bands > 5 else 0))
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    content += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    content = content.ljust(200, b"\0") + struct.pack("<H", bits) * bands
    return content.ljust(300 + size, b"\0")


@pytest.mark.parametrize("bands", [5, 6, 8, 13])
@pytest.mark.parametrize("photometric", [1, 2])
@pytest.mark.parametrize("bits", [8, 16])
def test_many_bands_are_named(tmp_path: Path, bands: int, photometric: int, bits: int) -> None:
    """Of red, green, blue and two more, which Pillow opens, the two would vanish silently."""
    path = tmp_path / "a.tif"
    path.write_bytes(multiband_tiff(bands, bits, photometric))
    for read in (read_image, read_mask, read_size):
        with pytest.raises(DataError, match=rf"a\.tif: has {bands} bands; expected 1, 3 or 4\."):
            read(path)


def test_a_layout_that_is_not_read_is_described(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(multiband_tiff(3, 64, 2))
    with pytest.raises(
        DataError, match="is a TIFF file with 3 bands of 64 bits in an unsupported layout"
    ):
        read_image(path)


def test_raw_files_are_refused_by_name(tmp_path: Path) -> None:
    """A DNG is a TIFF file, of which the preview would be read."""
    Image.fromarray(COLORS).save(tmp_path / "a.DNG", "TIFF")
    with pytest.raises(DataError, match=r"a\.DNG: is a raw camera file"):
        read_image(tmp_path / "a.DNG")


def test_further_pages_are_seen_but_smaller_copies_are_none(tmp_path: Path) -> None:
    pages = [Image.fromarray(COLORS), Image.fromarray(COLORS)]
    for name, kind, expected in (("a", 0, True), ("b", 1, False), ("c", 4, False)):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[254] = kind
        pages[1].encoderinfo = {"tiffinfo": info}
        path = tmp_path / f"{name}.tif"
        pages[0].save(path, save_all=True, append_images=pages[1:])
        assert read_header(path).has_more_frames == expected
    assert read_header(path).num_pixels == 6
    pages[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=pages[1:])
    assert not read_header(tmp_path / "phone.jpg").has_more_frames


def test_label_maps_and_images_round_trip(tmp_path: Path) -> None:
    write_png(tmp_path / "sub" / "ids.png", IDS)
    np.testing.assert_array_equal(read_mask(tmp_path / "sub" / "ids.png"), IDS)
    deep = np.array([[0, 300, 65535]], np.uint16)
    write_png(tmp_path / "deep.png", deep)
    np.testing.assert_array_equal(read_mask(tmp_path / "deep.png"), deep)
    write_png(tmp_path / "rgb.png", COLORS[::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), COLORS[::-1])
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    write_jpeg(tmp_path / "flat.jpg", flat)
    np.testing.assert_allclose(read_image(tmp_path / "flat.jpg").astype(int), flat, atol=4)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"`array` is float64 \[2, 2\]"):
        write_png(tmp_path / "a.png", np.zeros((2, 2)))
    with pytest.raises(ShapeError, match=r"`array` is uint8 \[2, 2, 4\]"):
        write_png(tmp_path / "a.png", np.zeros((2, 2, 4), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["write_jpeg", "write_png"])
def test_what_does_not_fit_on_the_disk_is_an_error_and_leaves_nothing(
    name: str, tmp_path: Path
) -> None:
    program = (
        "import resource, sys; from pathlib import Path; import numpy as np\n"
        f"from dcnseg.data.image_io import {name}\n"
        "noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))\n"
        f"{name}(Path(sys.argv[1]), noise)"
    )
    path = tmp_path / "image"
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []
