"""Pictures and masks from files and into files.

EXIF rotation, channel order and bit depth are decided here only. The entry points are `read_image`,
`read_mask`, `write_png` and `write_jpeg`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dcnseg.errors import DataError, ShapeError
from dcnseg.files import atomic_path

IMAGE_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2"}
)
# Named, so that no other decoder of Pillow's (PostScript, for one) is fed what a user downloaded.
_FORMATS: Final = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")
_BACKGROUND: Final = (255, 255, 255)  # behind transparent pixels, as viewers and browsers show them

UInt8Array = npt.NDArray[np.uint8]


def read_image(path: Path) -> UInt8Array:
    """Return the picture as it is displayed, RGB, uint8 [H, W, 3].

    EXIF rotation is applied; transparent pixels are laid on white; grey, palette, CMYK and 1-bit
    pictures become RGB; 16 bits are divided by 257, floats of 0..1 multiplied by 255. Of several
    frames the first is read.

    Raises:
        DataError: The file is missing, broken, cut off, no picture, or too large to be one (more
            than 179 million pixels); the message names it.
    """
    with _opened(path) as picture:
        picture.load()
        return _as_rgb(picture, path)


def read_mask(path: Path) -> npt.NDArray[Any]:
    """Return what the mask's pixels say: ids int32 [H, W], or colours uint8 [H, W, 3] (RGB).

    Ids come from 1-, 2-, 4-, 8- and 16-bit grey files as they stand (1-bit gives 0 and 1) and from
    palette files, of which the palette itself is disregarded. An alpha channel is dropped. EXIF
    rotation is applied as it is to pictures.

    Raises:
        DataError: As `read_image`; also when only the alpha channel holds something, and for values
            that are not whole numbers.
    """
    with _opened(path) as picture:
        scale = _grey_scale(picture, path)
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
            return _without_alpha(np.asarray(picture), path)
        if picture.mode not in ("1", "L", "P") and not picture.mode.startswith(("I", "F")):
            return np.array(picture.convert("RGB"))
        values = np.asarray(picture)
        if values.dtype.kind == "f" and not (np.isfinite(values) & (values % 1 == 0)).all():
            raise DataError(
                f"{path}: has pixel values that are not whole numbers; a mask holds class ids."
            )
        ids = values.astype(np.int32)
        return ids if scale == 1 else ids // scale


def read_size(path: Path) -> tuple[int, int]:
    """Return (height, width) as displayed, after decoding the file roughly to see that it is whole.

    Raises:
        DataError: As `read_image`.
    """
    with _opened(path) as picture:
        width, height = picture.size
        # Orientations 5..8 lie on their side; Pillow turns TIFF files itself.
        is_turned = picture.format != "TIFF" and exif_orientation(picture) >= 5
        picture.draft("RGB", (1, 1))  # JPEG: all bytes are read, but only 1/64 of the pixels made
        picture.load()
    return (width, height) if is_turned else (height, width)


def exif_orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation 1..8, 1 when there is none."""
    value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


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
    picture = Image.fromarray(np.ascontiguousarray(array))
    if palette is not None and array.dtype == np.uint8 and not is_rgb:
        picture.putpalette(np.ascontiguousarray(palette).tobytes())
    _save(picture, path, "PNG")


def write_jpeg(path: Path, rgb: UInt8Array, quality: int = 92) -> None:
    """Write uint8 RGB [H, W, 3] as JPEG; the file appears complete or not at all."""
    _save(Image.fromarray(np.ascontiguousarray(rgb)), path, "JPEG", quality=quality)


def _save(picture: Image.Image, path: Path, file_format: str, **options: Any) -> None:
    with atomic_path(path, is_durable=False) as temporary:
        picture.save(temporary, file_format, **options)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open `path` for decoding; whatever goes wrong inside becomes a DataError with its name."""
    try:
        # Not by name: Pillow would map uncompressed TIFF files, and garbles those that lie on their
        # side (seen in Pillow 13.0).
        with path.open("rb") as file, Image.open(file, formats=_FORMATS) as picture:
            yield picture
    except DataError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}).") from error
    except MemoryError as error:
        raise DataError(f"{path}: does not fit into memory.") from error
    # Broken files make Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error,
    # IndexError, ValueError, zlib.error, ...
    except Exception as error:
        raise DataError(f"{path}: {_diagnose(path, error)}") from error


def _diagnose(path: Path, error: Exception) -> str:
    """Say what a file that did not open is, from its first bytes where these tell."""
    if isinstance(error, Image.DecompressionBombError):
        return f"refused, {error}"
    try:
        with path.open("rb") as file:
            head = file.read(256).lstrip().lower()
    except OSError as read_error:
        return f"cannot be read ({read_error.strerror})."
    if not head:
        return "is empty."
    if head.startswith((b"<!doctype html", b"<html")):
        return "holds an HTML page, not a picture; the download went wrong."
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not a picture; run `git lfs pull`."
    if isinstance(error, UnidentifiedImageError):
        return "is not a picture in a known format."
    reason = str(error) or type(error).__name__
    return f"cannot be decoded, the file is damaged or cut off ({reason})."


def _as_rgb(picture: Image.Image, path: Path) -> UInt8Array:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        return np.repeat(_deep_to_bytes(np.asarray(picture), path)[..., None], 3, axis=2)
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema() != (255, 255):
            ground = Image.new("RGBA", picture.size, (*_BACKGROUND, 255))
            picture = Image.alpha_composite(ground, picture)
    return np.array(picture.convert("RGB"))


def _deep_to_bytes(values: npt.NDArray[Any], path: Path) -> UInt8Array:
    """Scale 16-bit and float grey values to 0..255."""
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return (values * 255 + 0.5).astype(np.uint8)
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    raise DataError(
        f"{path}: has {values.dtype} values {low:g}..{high:g}; floats must lie in 0..1 and whole "
        "numbers in 0..65535. Convert the picture to 8 or 16 bits."
    )


def _grey_scale(picture: Image.Image, path: Path) -> int:
    """By what Pillow multiplies the values of this grey PNG: 2-bit ids come as 0, 85, 170, 255."""
    if picture.format != "PNG" or picture.mode != "L":
        return 1
    with path.open("rb") as file:
        bit_depth = file.read(25)[24]
    return {2: 85, 4: 17}.get(bit_depth, 1)


def _without_alpha(values: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    """Drop the last channel of LA, PA or RGBA; refuse a mask that is drawn in it alone."""
    content, alpha = values[..., :-1], values[..., -1]
    if alpha.min() != alpha.max() and (content == content[:1, :1]).all():
        raise DataError(
            f"{path}: is of one colour and differs in its alpha channel only; write the classes "
            "into the grey or colour channels."
        )
    return content[..., 0].astype(np.int32) if content.shape[2] == 1 else content.copy()
