"""Opens image files safely: `open_image` converts every failure to a DataError with the file name.

This module defines the supported formats and reads bit depth and orientation from the header.
"""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from dcnseg.errors import DataError
from dcnseg.files import open_regular_file

IMAGE_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2"}
)
# An explicit list, so that downloaded files reach no other decoder of Pillow (such as PostScript).
_FORMATS: Final = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")
# Pillow warns above half of its size limit; such images are read like any other.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# First bytes of these formats; WebP has its name after the file size.
_MAGIC: Final = (b"\x89png", b"\xff\xd8\xff", b"bm", b"ii*\0", b"mm\0*", b"gif8", b"\0\0\0\x0cjp  ")
_FORMATS_TEXT: Final = "PNG, JPEG, BMP, TIFF, WebP, GIF, PNM and JPEG 2000"
_RAW: Final = "a raw image"
# Other files that cameras, phones and programs save.
UNSUPPORTED_KINDS: Final = {
    suffix: kind
    for kind, suffixes in {
        "a video": ".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv .3gp .mts",
        "a HEIC or AVIF image": ".heic .heif .avif",
        "an image in an unsupported format": ".jxl .exr .hdr .tga",
        "a medical image": ".dcm .nii",
        _RAW: ".dng .raw .nef .cr2 .cr3 .arw .nrw .orf .rw2 .raf .pef .srw",
        "an array": ".npy .npz",
        "a PDF": ".pdf",
        "a drawing": ".svg .eps .ai .psd .xcf",
    }.items()
    for suffix in suffixes.split()
}
_MAX_PNM_HEADER: Final = 4096  # bytes
_PNM_START: Final = re.compile(rb"P[0-6fy]")
_PNM_GAP: Final = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_HEADER: Final = re.compile(
    rb"P(?:[14](?:%b\d{1,9}){2}|[^14]\w{0,4}(?:%b[-.\d]{1,16}){3})\s" % (_PNM_GAP, _PNM_GAP)
)
_MOST_BANDS: Final = 4
_NEW_SUBFILE_TYPE: Final = 254  # tag of a TIFF page
_COPY_OR_MASK: Final = 1 | 4  # bits of its value
_PNG_GRAY: Final = 0  # color type in a PNG header
_BITS_OF_MODE: Final = {"1": 1, "F": 32}


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open `path` for decoding; any failure inside becomes a DataError with the file name."""
    # Many raw files are TIFF files, of which Pillow would read the small preview.
    if is_raw_file(path):
        raise DataError(
            f"{path}: is a raw camera file, which is not supported; export it as JPEG, PNG or TIFF."
        )
    try:
        # Not by name: Pillow would memory-map uncompressed TIFF files, and corrupts rotated ones
        # (seen in Pillow 13.0).
        with _opened_file(path) as file, _identified(file, path) as image:
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                bands = image.tag_v2.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
                if bands > _MOST_BANDS:
                    raise DataError(f"{path}: has {bands} bands; expected 1, 3 or 4.")
            yield image
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: does not fit in memory.") from error
    # Damaged files make Pillow's decoders raise many types: OSError, SyntaxError, struct.error,
    # IndexError, ValueError, zlib.error, ...
    except Exception as error:
        raise DataError(f"{path}: {_diagnose(path, error)}") from error


def _identified(file: IO[bytes], path: Path) -> Image.Image:
    head = file.read(_MAX_PNM_HEADER)
    file.seek(0)
    # Pillow reads a PNM header byte by byte, without a limit on its length.
    if _PNM_START.match(head) and not _PNM_HEADER.match(head):
        raise DataError(
            f"{path}: is a PNM file without width, height and maximum in its first "
            f"{_MAX_PNM_HEADER} bytes; the file is damaged or truncated."
        )
    return Image.open(file, formats=_FORMATS)


def _opened_file(path: Path) -> IO[bytes]:
    try:
        return open_regular_file(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist.") from error
    except OSError as error:
        if error.errno == errno.EINVAL and path.exists():
            raise DataError(
                f"{path}: is not a regular file but a folder, FIFO, socket or device; expected an "
                "image."
            ) from error
        raise DataError(f"{path}: cannot be opened ({error.strerror}).") from error


def _diagnose(path: Path, error: Exception) -> str:
    """Describe a file that could not be opened, if possible from its first bytes."""
    if isinstance(error, Image.DecompressionBombError):
        return f"refused, {error}"
    try:
        with open_regular_file(path) as file:
            head = file.read(256).lstrip().lower()
    except OSError as read_error:
        return f"cannot be read ({read_error.strerror})."
    if not head:
        return "is empty."
    if head.startswith((b"<!doctype html", b"<html")):
        return (
            "is an HTML page, not an image. The download probably failed; download the image again."
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not an image; run `git lfs pull`."
    if isinstance(error, UnidentifiedImageError):
        if not head.startswith(_MAGIC) and head[8:12] != b"webp":
            return f"is not an image in a supported format ({_FORMATS_TEXT})."
        return _diagnose_tiff(path) or "cannot be decoded; the file is damaged or truncated."
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError) and "conversion" in reason:
        return f"has an unsupported color space ({reason}); save it as RGB."
    return f"cannot be decoded; the file is damaged or truncated ({reason})."


def _diagnose_tiff(path: Path) -> str:
    """Describe a TIFF file that Pillow does not identify; empty if unknown."""
    with suppress(Exception):  # any bytes may follow the header
        tags = _read_tiff_tags(path)
        bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
        bands = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        if bands not in (1, 3, _MOST_BANDS):
            return f"has {bands} bands; expected 1, 3 or 4."
        return (
            f"is a TIFF file with {bands} {'band' if bands == 1 else 'bands'} of {bits} bits in an "
            "unsupported layout; save it with 8 or 16 bits."
        )
    return ""


def _read_tiff_tags(path: Path) -> TiffImagePlugin.ImageFileDirectory_v2:
    with open_regular_file(path) as file:
        header = file.read(8)
        if header[2:4] in (b"\x2b\0", b"\0\x2b"):  # BigTIFF
            header += file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
        return tags


def tiff_orientation(path: Path) -> int:
    """Return the orientation 1..8 of a TIFF file of any size; 1 if it cannot be read."""
    with suppress(Exception):
        value = _read_tiff_tags(path).get(ExifTags.Base.Orientation, 1)
        return value if isinstance(value, int) and 1 <= value <= 8 else 1
    return 1


def is_raw_file(path: Path) -> bool:
    """Whether the suffix is that of a camera's raw files; many are TIFF files with a preview."""
    return UNSUPPORTED_KINDS.get(path.suffix.lower()) == _RAW


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8, 1 if there is none."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def apply_orientation(array: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Rotate and mirror [H, W, ...] from stored to displayed for this EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return np.ascontiguousarray(array)


def png_header(image: Image.Image, path: Path) -> tuple[int, int] | None:
    """Return bit depth and color type of a PNG file, None for another format."""
    if image.format != "PNG":
        return None
    with open_regular_file(path) as file:
        header = file.read(26)
    return header[24], header[25]


def bit_depth(image: Image.Image, path: Path) -> int:
    """Return the bits per channel that the file holds."""
    header = png_header(image, path)
    if header is not None:
        return header[0]
    if image.mode.startswith("I"):
        return 16 if image.mode.startswith("I;16") else 32
    return _BITS_OF_MODE.get(image.mode, 8)


def read_16_bit_colors(image: Image.Image, path: Path) -> npt.NDArray[np.uint16] | None:
    """Return a 16-bit PNG with colors or alpha as uint16 [H, W, 3 or 4], RGB; else None.

    Pillow keeps only the high byte of such files, which loses class ids and 12-bit images.
    """
    header = png_header(image, path)
    if header is None or header[0] != 16 or header[1] == _PNG_GRAY:
        return None
    image.load()  # checks sizes and checksums
    with open_regular_file(path) as file:
        data = np.frombuffer(file.read(), np.uint8)
    content = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if content is None or content.dtype != np.uint16 or content.ndim != 3:
        raise OSError("the 16-bit colors cannot be decoded")
    return content[..., [2, 1, 0, 3][: content.shape[2]]].astype(np.uint16)


def has_more_frames(image: Image.Image) -> bool:
    """Whether the file has more animation frames or pages after the first.

    The second image of a phone's JPEG and the reduced copies and masks of a TIFF do not count.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    page = 0
    with suppress(EOFError):
        while True:
            page += 1
            image.seek(page)
            if not int(image.tag_v2.get(_NEW_SUBFILE_TYPE, 0)) & _COPY_OR_MASK:
                return True
    return False
