"""What a mask file's pixels say, before any class list: `read_mask_file`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from dcnseg.data.picture_file import (
    apply_orientation,
    bit_depth,
    exif_orientation,
    opened_picture,
    png_header,
    read_deep_colours,
)
from dcnseg.errors import DataError

_WITH_ALPHA: Final = ("LA", "PA", "RGBA", "La", "RGBa")


@dataclass(frozen=True)
class MaskFile:
    """A mask as its file holds it.

    Attributes:
        values: Ids int32 [H, W], or colours uint8 [H, W, 3] (RGB), as displayed.
        encoding: "values", "colours" or "alpha", the part of the file that they come from.
        file_format: Pillow's name of the format.
        mode: Pillow's name of the channels.
        bits: Bits per channel in the file.
        orientation: EXIF orientation 1..8 that has been applied.
        palette: Colours of the indices, uint8 [N, 3], of a palette file; else None.
    """

    values: npt.NDArray[Any]
    encoding: str
    file_format: str
    mode: str
    bits: int
    orientation: int
    palette: npt.NDArray[np.uint8] | None = None


def read_mask_file(path: Path) -> MaskFile:
    """Read a mask in any encoding.

    Ids come from 1-, 2-, 4-, 8- and 16-bit grey files as they stand (1-bit gives 0 and 1) and from
    palette files, of which the palette itself is disregarded. An alpha channel is dropped unless it
    alone holds something; then its values are the ids.

    Raises:
        DataError: The file is missing, broken, cut off or no picture, or has values that are not
            whole numbers.
    """
    with opened_picture(path) as picture:
        scale = _grey_scale(picture, path)
        bits, mode = bit_depth(picture, path), picture.mode
        orientation = exif_orientation(picture)
        deep = read_deep_colours(picture, path)
        picture.load()
        palette = _palette(picture)
        if deep is None:
            values, encoding = _values(picture, path)
        else:
            values, encoding = _deep_values(deep, path)
        if picture.format != "TIFF":  # Pillow turns TIFF files itself
            values = apply_orientation(values, orientation)
        if scale != 1:
            values = values // scale
        return MaskFile(values, encoding, str(picture.format), mode, bits, orientation, palette)


def _values(picture: Image.Image, path: Path) -> tuple[npt.NDArray[Any], str]:
    if picture.mode in _WITH_ALPHA:
        return _split_alpha(np.asarray(picture))
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith(("I", "F")):
        return np.array(picture.convert("RGB")), "colours"
    values = np.asarray(picture)
    if values.dtype.kind == "f":
        _require_whole(values, path)
    return values.astype(np.int32), "values"


def _require_whole(values: npt.NDArray[Any], path: Path) -> None:
    is_whole = np.isfinite(values)
    is_whole[is_whole] = (values[is_whole] % 1 == 0) & (np.abs(values[is_whole]) < 2**31)
    if not is_whole.all():
        raise DataError(
            f"{path}: has pixel values that are not whole numbers; a mask holds class ids."
        )


def _split_alpha(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], str]:
    """Drop the last channel of LA, PA or RGBA, or take it alone if the others say nothing."""
    content, alpha = values[..., :-1], values[..., -1]
    if (content == content[:1, :1]).all() and alpha.min() < alpha.max():
        return alpha.astype(np.int32), "alpha"
    if (content == content[:1, :1]).all() and alpha.max() == 0:
        return np.zeros(alpha.shape, np.int32), "alpha"  # drawn in alpha, and nothing is
    if content.shape[2] == 1:
        return content[..., 0].astype(np.int32), "values"
    return content.copy(), "colours"


def _deep_values(deep: npt.NDArray[np.uint16], path: Path) -> tuple[npt.NDArray[Any], str]:
    """Ids from equal 16-bit channels, colours from others whose 16 bits repeat 8."""
    if deep.shape[2] == 4:
        values, encoding = _split_alpha(deep)
        if encoding == "alpha":
            return values, encoding
    colours = deep[..., :3]
    if (colours == colours[..., :1]).all():
        return colours[..., 0].astype(np.int32), "values"
    high = colours >> 8
    if not ((colours == high * 257) | (colours == high << 8)).all():
        raise DataError(f"{path}: has 16-bit colours that no 8-bit colour equals; save it in 8.")
    return high.astype(np.uint8), "colours"


def _palette(picture: Image.Image) -> npt.NDArray[np.uint8] | None:
    colours = picture.getpalette("RGB") if picture.mode == "P" else None
    return None if not colours else np.array(colours, np.uint8).reshape(-1, 3)


def _grey_scale(picture: Image.Image, path: Path) -> int:
    """By what Pillow multiplies the values of this grey PNG: 2-bit ids come as 0, 85, 170, 255."""
    header = png_header(picture, path)
    if header is None or picture.mode != "L":
        return 1
    return {2: 85, 4: 17}.get(header[0], 1)
