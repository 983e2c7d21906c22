"""Facts about one file that do not depend on the classes: `inspect_image`, `inspect_mask`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.dataset import is_gray_mask
from dcnseg.data.image_io import read_image_info
from dcnseg.data.label_codes import pack_color, unpack_color
from dcnseg.data.mask_file import MaskFile, read_mask_file
from dcnseg.data.polygons.drawings import rasterize
from dcnseg.data.sample import Sample
from dcnseg.files import open_regular_file

_THUMBNAIL_BYTES: Final = 8 * 9
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

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads."""
        return asdict(self) | {"size_hw": list(self.size_hw)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ImageFacts:
        """Rebuild the facts from the result of `to_json`.

        Raises:
            ValueError: The content is not such a result.
        """
        _check_fields(cls, content)
        if len(bytes.fromhex(content["thumbnail"])) != _THUMBNAIL_BYTES:
            raise ValueError(f"the thumbnail does not have {_THUMBNAIL_BYTES} bytes")
        return cls(**(content | {"size_hw": _pair(content["size_hw"])}))


@dataclass(frozen=True)
class MaskFacts:
    """A mask and its values.

    Attributes:
        size_hw: As displayed.
        file_format: Name of the format.
        mode: Name of the channels.
        bits: Bits per channel in the file.
        orientation: EXIF orientation of the mask file itself.
        encoding: "values", "alpha", "equal channels" or "colors".
        counts: Pixels per value, or per color 0xRRGGBB; at most the 4096 most frequent.
        num_values: Number of distinct values or colors.
        palette: Of a palette file, the color 0xRRGGBB of each value that occurs.
    """

    size_hw: tuple[int, int]
    file_format: str
    mode: str
    bits: int
    orientation: int
    encoding: str
    counts: dict[int, int]
    num_values: int
    palette: dict[int, int]

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

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads."""
        lists = {
            "size_hw": list(self.size_hw),
            "counts": [list(pair) for pair in self.counts.items()],
            "palette": [list(pair) for pair in self.palette.items()],
        }
        return asdict(self) | lists

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> MaskFacts:
        """Rebuild the facts from the result of `to_json`.

        Raises:
            ValueError: The content is not such a result.
        """
        _check_fields(cls, content)
        changed = {
            "size_hw": _pair(content["size_hw"]),
            "counts": dict(map(_pair, content["counts"])),
            "palette": dict(map(_pair, content["palette"])),
        }
        return cls(**(content | changed))


def _check_fields(kind: type, content: dict[str, Any]) -> None:
    """Raise a ValueError unless the content has the fields of a class with their JSON types."""
    types = {"int": int, "str": str, "bool": bool}  # other fields are written as lists
    expected = {f.name: types.get(str(f.type), list) for f in fields(kind)}
    if {name: type(value) for name, value in content.items()} != expected:
        raise ValueError(f"the content is not that of {kind.__name__}")


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
    if is_gray_mask(values):
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
