"""Reads and writes images and masks.

Only this module, `image_file` and `mask_file` handle EXIF rotation, channel order and bit depth.
The entry points are `read_image`, `read_mask`, `write_png` and `write_jpeg`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dcnseg.data.image_file import (
    apply_orientation,
    bit_depth,
    exif_orientation,
    has_more_frames,
    open_image,
    read_16_bit_colors,
)
from dcnseg.data.mask_file import read_mask_file
from dcnseg.errors import DataError, ShapeError
from dcnseg.files import atomic_path

_BACKGROUND: Final = (255, 255, 255)  # of transparent pixels, as in viewers and browsers
_SENSOR_BITS: Final = (8, 10, 12, 14, 16)  # depths of cameras and scanners, stored in 16 bits
_MAX_JPEG_SIDE: Final = 65500  # libjpeg's
_STRIP_ROWS: Final = 512
_IN_MEMORY: Final = Path("`image`")  # in messages, instead of a file's name
_COLOR_TYPES: Final = (np.uint8, np.uint16)
_GRAY_TYPES: Final = (*_COLOR_TYPES, np.bool_, np.int32, np.float32, np.float64)
_THUMB_HW: Final = (8, 9)
_THUMB_CELL: Final = 4

UInt8Array = npt.NDArray[np.uint8]
AnyImage = str | os.PathLike[str] | Image.Image | npt.NDArray[Any]


@dataclass(frozen=True)
class ImageInfo:
    """Facts about an image after decoding it at low resolution."""

    size_hw: tuple[int, int]  # as displayed
    file_format: str  # Pillow's name
    mode: str  # Pillow's name of the channels
    bits: int  # per channel in the file
    orientation: int  # EXIF, 1..8
    has_more_frames: bool  # whether other frames or pages follow the first
    thumbnail: UInt8Array  # the displayed image in gray, uint8 [8, 9]


@dataclass(frozen=True)
class ImageHeader:
    """Facts about an image before it is decoded."""

    num_pixels: int
    has_more_frames: bool  # whether other frames or pages follow the first


def read_header(path: Path) -> ImageHeader:
    """Read the header of an image file.

    Raises:
        DataError: As `read_image`.
    """
    with open_image(path) as image:
        return ImageHeader(image.width * image.height, has_more_frames(image))


def is_gray(image: UInt8Array) -> bool:
    """Whether the three channels of an image or mask [H, W, 3] are equal everywhere."""
    # Check a few rows first, which is enough for most colors.
    for part in (image[:: max(1, len(image) // 8)], image):
        if not ((part[..., 0] == part[..., 1]) & (part[..., 0] == part[..., 2])).all():
            return False
    return True


def read_image(path: Path) -> UInt8Array:
    """Return the image as displayed, RGB uint8 [H, W, 3].

    EXIF rotation is applied; transparent pixels are blended with white; gray, palette, CMYK and
    1-bit images become RGB. Deeper images are scaled by their range: 16 bits by the smallest of 8,
    10, 12, 14 and 16 bits that fits the greatest value, floats by 0..1, 0..255 or 0..65535 if they
    fit, and all others by their minimum and maximum. Only the first of several frames is read.

    Raises:
        DataError: The file is missing, damaged, truncated, not an image, has more than 179 million
            pixels, or has values that are not finite; the message names it.
    """
    with open_image(path) as image:
        orientation = exif_orientation(image)
        deep = read_16_bit_colors(image, path)
        if deep is not None:
            return apply_orientation(_deep_as_rgb(deep, path), orientation)
        image.load()
        return _as_rgb(image, path)


def as_rgb_array(image: AnyImage) -> UInt8Array:
    """Return an image as `read_image` would return it from a file, RGB, uint8 [H, W, 3].

    Args:
        image: A file, a PIL image of any mode, or an array: gray [H, W] or [H, W, 1], RGB
            [H, W, 3] or RGBA [H, W, 4], of type uint8 or uint16; gray also bool, int32,
            float32 or float64.

    Raises:
        DataError: The file cannot be read, or values are not finite.
        ShapeError: The array has another shape or type.
    """
    if isinstance(image, Image.Image):
        return _as_rgb(image.copy(), _IN_MEMORY)
    if not isinstance(image, np.ndarray):
        return read_image(Path(image))
    gray = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    types = _GRAY_TYPES if gray.ndim == 2 else _COLOR_TYPES
    is_image = gray.ndim == 2 or (gray.ndim == 3 and gray.shape[2] in (3, 4))
    if not is_image or image.dtype not in types or not image.size:
        raise ShapeError(
            f"`image` is {image.dtype} {list(image.shape)}; expected uint8 or uint16 "
            "[H, W], [H, W, 3] or [H, W, 4]."
        )
    if gray.ndim == 3 and gray.dtype == np.uint16:
        return _deep_as_rgb(gray, _IN_MEMORY)
    if gray.ndim == 3 and gray.shape[2] == 3:
        return np.require(gray, requirements=["C", "W"])  # PyTorch takes no other
    values = gray.astype(np.float32) if gray.dtype == np.float64 else gray
    return _as_rgb(Image.fromarray(np.ascontiguousarray(values)), _IN_MEMORY)


def read_mask(path: Path) -> npt.NDArray[Any]:
    """Return the pixels of a mask: ids int32 [H, W], or colors uint8 [H, W, 3] (RGB).

    EXIF rotation is applied; see `read_mask_file`.

    Raises:
        DataError: As `read_mask_file`.
    """
    return read_mask_file(path).values


def read_size(path: Path) -> tuple[int, int]:
    """Return (height, width) as displayed, and decode the file to verify that it is complete.

    Raises:
        DataError: As `read_image`.
    """
    return read_image_info(path).size_hw


def read_image_info(path: Path) -> ImageInfo:
    """Decode an image at the lowest resolution that verifies that the file is complete.

    Raises:
        DataError: As `read_image`.
    """
    with open_image(path) as image:
        width, height = image.size
        mode, bits = image.mode, bit_depth(image, path)
        orientation = exif_orientation(image)
        # JPEG: reads all bytes, but computes as little as 1/64 of the pixels.
        image.draft("L", (_THUMB_HW[1] * _THUMB_CELL, _THUMB_HW[0] * _THUMB_CELL))
        image.load()
        turn = orientation
        if image.format == "TIFF":  # already rotated by Pillow
            (width, height), turn = image.size, 1
        size_hw = (width, height) if turn >= 5 else (height, width)
        thumbnail = _thumbnail(image, path, turn)
        return ImageInfo(
            size_hw, str(image.format), mode, bits, orientation, has_more_frames(image), thumbnail
        )


def read_orientation(path: Path) -> int:
    """Return the EXIF orientation 1..8 of an image; reads only the header.

    Raises:
        DataError: As `read_image`.
    """
    with open_image(path) as image:
        return exif_orientation(image)


def _thumbnail(image: Image.Image, path: Path, turn: int) -> UInt8Array:
    """Return the image in gray, with the orientation `turn` applied, uint8 [8, 9]."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_deep_to_bytes(np.asarray(image), path))
    gray = image if image.mode == "L" else image.convert("RGB").convert("L")
    height, width = (side * _THUMB_CELL for side in _THUMB_HW)
    size = (height, width) if turn >= 5 else (width, height)
    upright = apply_orientation(np.asarray(gray.resize(size, Image.Resampling.BOX)), turn)
    cells = upright.reshape(_THUMB_HW[0], _THUMB_CELL, _THUMB_HW[1], _THUMB_CELL)
    thumbnail: UInt8Array = cells.mean(axis=(1, 3)).round().astype(np.uint8)
    return thumbnail


def write_png(path: Path, array: npt.NDArray[Any], palette: UInt8Array | None = None) -> None:
    """Write uint8 [H, W] (with `palette` a palette PNG), uint16 [H, W] or uint8 RGB [H, W, 3].

    The file appears complete or not at all. `palette` is uint8 [N, 3], N <= 256.

    Raises:
        ShapeError: Another shape or dtype.
    """
    is_rgb = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not is_rgb and not (array.ndim == 2 and array.dtype in (np.uint8, np.uint16)):
        raise ShapeError(
            f"`array` is {array.dtype} {list(array.shape)}; a PNG takes uint8 or uint16 [H, W] or "
            "uint8 [H, W, 3]."
        )
    image = Image.fromarray(np.ascontiguousarray(array))
    if palette is not None and array.dtype == np.uint8 and not is_rgb:
        image.putpalette(np.ascontiguousarray(palette).tobytes())
    _save(image, path, "PNG")


def write_jpeg(path: Path, rgb: UInt8Array, quality: int = 92) -> None:
    """Write uint8 RGB [H, W, 3] as JPEG; the file appears complete or not at all.

    An image with a side above 65500 pixels, the limit of JPEG, is scaled down.
    """
    write_jpeg_strips(path, (rgb.shape[0], rgb.shape[1]), [rgb], quality)


def write_jpeg_strips(
    path: Path, size_hw: tuple[int, int], strips: Iterable[UInt8Array], quality: int = 92
) -> None:
    """Write a JPEG from strips of rows, top first; otherwise like `write_jpeg`."""
    image = Image.new("RGB", size_hw[::-1])
    top = 0
    for strip in strips:
        image.paste(Image.fromarray(np.ascontiguousarray(strip)), (0, top))
        top += len(strip)
    if max(image.size) > _MAX_JPEG_SIDE:
        image.thumbnail((_MAX_JPEG_SIDE, _MAX_JPEG_SIDE), Image.Resampling.BOX)
    _save(image, path, "JPEG", quality=quality)


def _save(image: Image.Image, path: Path, file_format: str, **options: Any) -> None:
    with atomic_path(path, is_durable=False) as temporary, temporary.open("wb") as file:
        image.save(_Writer(file), file_format, **options)  # type: ignore[arg-type]


class _Writer:
    """A file without a descriptor: with one, Pillow does not report a full disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write
        self.flush = file.flush


def _as_rgb(image: Image.Image, path: Path) -> UInt8Array:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        return np.repeat(_deep_to_bytes(np.asarray(image), path)[..., None], 3, axis=2)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            ground = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
            image = Image.alpha_composite(ground, image)
    return _to_array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_array(image: Image.Image) -> UInt8Array:
    """Copy RGB pixels in strips; np.asarray of the image takes three times as much memory."""
    width, height = image.size
    array = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, height)
        array[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return array


def _deep_as_rgb(deep: npt.NDArray[np.uint16], path: Path) -> UInt8Array:
    """Scale 16-bit RGB to 0..255, and blend transparent pixels with white."""
    rgb = _deep_to_bytes(deep[..., :3], path)
    if deep.shape[2] == 3:
        return rgb
    alpha = deep[..., 3:].astype(np.float32) / 65535
    return (rgb * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def _deep_to_bytes(values: npt.NDArray[Any], path: Path) -> UInt8Array:
    """Scale 16-bit, 32-bit and float values to 0..255 by their range."""
    return scale_to_bytes(values, float(values.min()), float(values.max()), path)


def scale_to_bytes(values: npt.NDArray[Any], low: float, high: float, path: Path) -> UInt8Array:
    """Scale a part of an image deeper than 8 bits to 0..255, as `read_image` scales the whole.

    Args:
        values: Pixels of any shape, 16-bit, 32-bit or float.
        low: The smallest value of the whole image.
        high: The greatest value of the whole image.
        path: The image, for messages.

    Raises:
        DataError: `low` or `high` is not finite.
    """
    if not np.isfinite([low, high]).all():
        raise DataError(f"{path}: has NaN or infinite pixel values; expected finite values.")
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        top = next(2**bits - 1 for bits in _SENSOR_BITS if high < 2**bits)
        return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    if values.dtype.kind == "f" and low >= 0 and high <= 65535:
        low, high = 0.0, next(top for top in (1.0, 255.0, 65535.0) if high <= top)
    scale = 255 / (high - low) if high > low else 0.0
    return ((values.astype(np.float64) - low) * scale + 0.5).astype(np.uint8)
