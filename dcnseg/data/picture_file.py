"""Opening a picture file safely: `opened_picture` turns whatever goes wrong into a named DataError.

Which file formats are read, and what the header says of bit depth and orientation, is known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from dcnseg.errors import DataError

IMAGE_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2"}
)
# Named, so that no other decoder of Pillow's (PostScript, for one) is fed what a user downloaded.
_FORMATS: Final = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")
_PNG_GREY: Final = 0  # colour type in a PNG header
_BITS_OF_MODE: Final = {"1": 1, "F": 32}


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
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
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError) and "conversion" in reason:
        return f"has a colour space that cannot be read ({reason}); save it as RGB."
    return f"cannot be decoded, the file is damaged or cut off ({reason})."


def exif_orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation 1..8, 1 when there is none."""
    value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def apply_orientation(array: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn [H, W, ...] as stored into what a viewer shows for this EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def png_header(picture: Image.Image, path: Path) -> tuple[int, int] | None:
    """Return bit depth and colour type of a PNG file, None for another format."""
    if picture.format != "PNG":
        return None
    with path.open("rb") as file:
        header = file.read(26)
    return header[24], header[25]


def bit_depth(picture: Image.Image, path: Path) -> int:
    """Return the bits per channel that the file holds."""
    header = png_header(picture, path)
    if header is not None:
        return header[0]
    if picture.mode.startswith("I"):
        return 16 if picture.mode.startswith("I;16") else 32
    return _BITS_OF_MODE.get(picture.mode, 8)


def read_deep_colours(picture: Image.Image, path: Path) -> npt.NDArray[np.uint16] | None:
    """Return a 16-bit PNG with colours or alpha as uint16 [H, W, 3 or 4], RGB; else None.

    Pillow keeps the high byte of such files only, in which class ids and 12-bit pictures vanish.
    """
    header = png_header(picture, path)
    if header is None or header[0] != 16 or header[1] == _PNG_GREY:
        return None
    picture.load()  # its checks of sizes and checksums come first
    content = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if content is None or content.dtype != np.uint16 or content.ndim != 3:
        raise OSError("the 16-bit colours cannot be decoded")
    return content[..., [2, 1, 0, 3][: content.shape[2]]].astype(np.uint16)
