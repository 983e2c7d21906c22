"""Damaged image files of every format give an array or a DataError that names the file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcnseg.data.image_io import read_image, read_mask, read_size
from dcnseg.errors import DataError

CASES_PER_FILE = 110


def files() -> dict[str, bytes]:
    """Small images in every format and in the modes that are decoded in ways of their own."""
    rng = np.random.default_rng(3)
    rgb = Image.fromarray(rng.integers(0, 256, (23, 31, 3), np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (23, 31)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (rgb, {"exif": exif}),
        "palette.png": (rgb.quantize(9), {"transparency": 3}),
        "deep.png": (deep, {}),
        "alpha.png": (rgb.convert("LA"), {}),
        "bits.png": (rgb.convert("1"), {}),
        "baseline.jpg": (rgb, {"exif": exif}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "plain.tif": (rgb, {}),
        "packed.tif": (rgb, {"compression": "tiff_lzw"}),
        "deflated.tif": (deep, {"compression": "tiff_adobe_deflate"}),
        "float.tif": (rgb.convert("F"), {}),
        "lossy.webp": (rgb, {}),
        "lossless.webp": (rgb, {"lossless": True}),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (rgb.quantize(9), {}),
        "palette.gif": (rgb.quantize(9), {}),
        "rgb.ppm": (rgb, {}),
        "rgb.jp2": (rgb, {}),
    }
    contents = {}
    for name, (image, options) in images.items():
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[Path(name).suffix], **options)
        contents[name] = buffer.getvalue()
    return contents


FILES = files()


def damaged(content: bytes, seed: int) -> Iterator[bytes]:
    """Cut the file off, change bytes of it (mostly in the header), or both."""
    rng = np.random.default_rng(seed)
    for case in range(CASES_PER_FILE):
        data = bytearray(content)
        if case % 3 != 0:
            reach = len(data) if case % 2 else min(len(data), 80)
            for position in rng.integers(0, reach, rng.integers(1, 6)):
                data[position] = rng.integers(0, 256)
        if case % 3 != 1:
            del data[int(rng.integers(0, len(data))) :]
        yield bytes(data)


@pytest.mark.parametrize("name", FILES)
# Outside of tests Pillow's warnings are silenced by the command line, or merely printed.
@pytest.mark.filterwarnings("ignore::Warning:PIL")
def test_damage_gives_an_array_or_a_named_error(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    readings = 0
    for content in damaged(FILES[name], seed=len(name)):
        path.write_bytes(content)
        for read in (read_image, read_mask, read_size):
            try:
                result = read(path)
            except DataError as error:
                text = str(error)
                assert text.startswith(f"{path}: ")
                assert "\n" not in text
            else:
                assert isinstance(result, tuple) or result.size > 0
                readings += 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "" or name in ("packed.tif", "deflated.tif")  # libtiff itself prints there
    assert "Traceback" not in err
    assert readings < 3 * CASES_PER_FILE  # cut files are found
    path.write_bytes(FILES[name])
    assert read_image(path).shape == (*read_size(path), 3)


@pytest.mark.parametrize(
    "header",
    [b"P6\n#" + bytes(10**6), b"P5" + b" " * 10**6, b"P4\n#\n8 ", b"Pf\n1 1\n", b"P3 2 2\n#" * 2],
)
def test_headers_without_an_end_are_refused_at_once(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.ppm"
    path.write_bytes(header)
    with pytest.raises(DataError, match=r"a\.ppm: is a PNM file without width, height and maximum"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"P6\n# one\n#two\r\n 1\t1\n# three\n255\n\x07\x08\x09", (7, 8, 9)),
        (b"P2 1 1 255\n 7\n", (7, 7, 7)),
        (b"P4 1 1\n\x80", (0, 0, 0)),
        (b"P1\n# c\n1 1\n1\n", (0, 0, 0)),
    ],
)
def test_pnm_headers_with_comments_are_read(
    tmp_path: Path, content: bytes, value: tuple[int, ...]
) -> None:
    path = tmp_path / "a.pnm"
    path.write_bytes(content)
    assert tuple(read_image(path)[0, 0]) == value
