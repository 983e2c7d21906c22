"""Facts about one file that do not depend on the classes: `inspect_image`, `inspect_mask`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from dcnseg.data.image_io import is_gray, read_image_info
from dcnseg.data.label_codes import pack_color, unpack_color
from dcnseg.data.mask_file import MaskFile, read_mask_file
from dcnseg.data.polygons.drawings import rasterize
from dcnseg.data.sample import Sample
from dcnseg.files import open_regular_file

_THUMBNAIL_BYTES: Final = 8 * 9
_DICTIONARIES: Final = {"counts", "palette"}  # lists of pairs in JSON
MAX_COUNTED: Final = 4096  # distinct colors of one mask; a blurred one has a hundred thousand


@dataclass(frozen=True)
class ImageFacts:
    """An image as displayed; `thumbnail` and `digest` (of the file) are hexadecimal."""

    size_hw: tuple[int, int]
    file_format: str
    mode: str
    bits: int
    orientation: int
    has_more_frames: bool
    thumbnail: str
    digest: str


@dataclass(frozen=True)
class MaskFacts:
    """A mask and its values."""

    size_hw: tuple[int, int]  # as displayed
    file_format: str
    mode: str  # name of the channels
    bits: int  # per channel in the file
    orientation: int  # EXIF, of the mask file itself
    encoding: str  # "values", "alpha", "equal channels" or "colors"
    counts: dict[int, int]  # pixels per value, or per color 0xRRGGBB; the 4096 most frequent
    num_values: int  # number of distinct values or colors
    palette: dict[int, int]  # of a palette file, the color 0xRRGGBB of each value that occurs

    @property
    def is_colored(self) -> bool:
        """Whether the channels differ, so that colors define the classes."""
        return self.encoding == "colors"

    def distinct(self) -> npt.NDArray[Any]:
        """Return the counted values as a mask of one row, [1, N] or [1, N, 3]."""
        if self.is_colored:
            return np.array([[unpack_color(code) for code in self.counts]], np.uint8)
        values = np.array([list(self.counts)], np.int32)
        if self.encoding == "equal channels":
            return np.repeat(values[..., None], 3, axis=2).astype(np.uint8)
        return values


Facts = TypeVar("Facts", ImageFacts, MaskFacts)


def to_json(facts: ImageFacts | MaskFacts) -> dict[str, Any]:
    """Return the form that `from_json` reads."""
    content = asdict(facts) | {"size_hw": list(facts.size_hw)}
    for name in _DICTIONARIES & content.keys():
        content[name] = [list(pair) for pair in content[name].items()]
    return content


def from_json(kind: type[Facts], content: dict[str, Any]) -> Facts:
    """Rebuild facts from the result of `to_json`.

    Raises:
        ValueError: The content is not such a result.
    """
    types = {"int": int, "str": str, "bool": bool}  # other fields are written as lists
    expected = {f.name: types.get(str(f.type), list) for f in fields(kind)}
    if {name: type(value) for name, value in content.items()} != expected:
        raise ValueError(f"the content is not that of {kind.__name__}")
    if kind is ImageFacts and len(bytes.fromhex(content["thumbnail"])) != _THUMBNAIL_BYTES:
        raise ValueError(f"the thumbnail does not have {_THUMBNAIL_BYTES} bytes")
    names = _DICTIONARIES & content.keys()
    changed = {name: dict(map(_pair, content[name])) for name in names}
    return kind(**(content | {"size_hw": _pair(content["size_hw"])} | changed))


def _pair(values: Any) -> tuple[int, int]:
    if not isinstance(values, list) or [type(value) for value in values] != [int, int]:
        raise ValueError("expected two integers")
    return values[0], values[1]


def inspect_image(path: Path) -> ImageFacts:
    """Read the facts of an image.

    Raises:
        DataError: It cannot be read.
    """
    info = read_image_info(path)
    with open_regular_file(path) as file:
        digest = hashlib.blake2b(file.read(), digest_size=16).hexdigest()
    facts: dict[str, Any] = vars(info) | {"thumbnail": info.thumbnail.tobytes().hex()}
    return ImageFacts(**facts, digest=digest)


def inspect_polygons(sample: Sample, ids: Mapping[str, int]) -> MaskFacts:
    """Draw the polygons of an image and count their ids.

    Raises:
        DataError: They cannot be drawn.
    """
    values = rasterize(sample, ids)
    found, counts = _count(values)
    pixels = dict(zip(found.tolist(), counts.tolist(), strict=True))
    size_hw = values.shape[0], values.shape[1]
    return MaskFacts(size_hw, "JSON", "polygons", 0, 1, "values", pixels, len(found), {})


def inspect_mask(path: Path) -> MaskFacts:
    """Read the facts of a mask and count its values.

    Raises:
        DataError: It cannot be read.
    """
    mask = read_mask_file(path)
    encoding, values = _plain_values(mask)
    found, counts = _count(values)
    order = np.argsort(-counts, kind="stable")[:MAX_COUNTED]
    palette: dict[int, int] = {}
    if mask.palette is not None:
        used = found[found < len(mask.palette)]
        palette = {int(value): pack_color(mask.palette[value].tolist()) for value in used}
    size_hw = mask.values.shape[0], mask.values.shape[1]
    pixels = {int(found[i]): int(counts[i]) for i in order}
    file = mask.file_format, mask.mode, mask.bits, mask.orientation
    return MaskFacts(size_hw, *file, encoding, pixels, len(found), palette)


def _plain_values(mask: MaskFile) -> tuple[str, npt.NDArray[Any]]:
    """Return the encoding, and the values or colors as one number each."""
    values = mask.values
    if values.ndim == 2:
        return mask.encoding, values
    if is_gray(values):
        return "equal channels", values[..., 0].astype(np.int32)
    red, green, blue = (values[..., channel].astype(np.int32) for channel in range(3))
    return "colors", (red << 16) | (green << 8) | blue


def _count(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the distinct values, ascending, and their pixel counts."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        return np.unique(values, return_counts=True)
    counts = np.bincount(values.ravel())  # ten times as fast as sorting
    found = np.flatnonzero(counts)
    return found, counts[found]
