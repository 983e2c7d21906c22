"""Reads the pixels of a mask file, before a class list is applied: `read_mask_file`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from dcnseg.data.image_file import (
    apply_orientation,
    bit_depth,
    exif_orientation,
    open_image,
    png_header,
    read_16_bit_colors,
)
from dcnseg.errors import DataError

_WITH_ALPHA: Final = ("LA", "PA", "RGBA", "La", "RGBa")


@dataclass(frozen=True)
class MaskFile:
    """The content of a mask file."""

    values: npt.NDArray[Any]  # ids int32 [H, W], or colors uint8 [H, W, 3] (RGB), as displayed
    encoding: str  # origin of the values: "values", "colors" or "alpha"
    file_format: str  # Pillow's name
    mode: str  # Pillow's name of the channels
    bits: int  # per channel in the file
    orientation: int  # EXIF, 1..8; has been applied
    palette: npt.NDArray[np.uint8] | None = None  # colors of the indices, uint8 [N, 3]


def read_mask_file(path: Path) -> MaskFile:
    """Read a mask in any encoding.

    Ids are the values of 1-, 2-, 4-, 8- and 16-bit gray files (1-bit gives 0 and 1) and the indices
    of palette files. An alpha channel is dropped, unless the other channels are constant; then its
    values are the ids.

    Raises:
        DataError: The file is missing, damaged, truncated or not an image, or has values that are
            not integers.
    """
    with open_image(path) as image:
        scale = _gray_scale(image, path)
        bits, mode = bit_depth(image, path), image.mode
        orientation = exif_orientation(image)
        deep = read_16_bit_colors(image, path)
        image.load()
        palette = _palette(image)
        if deep is None:
            values, encoding = _values(image, path)
        else:
            values, encoding = _deep_values(deep, path)
        if image.format != "TIFF":  # Pillow rotates TIFF files itself
            values = apply_orientation(values, orientation)
        if scale != 1:
            values = values // scale
        return MaskFile(values, encoding, str(image.format), mode, bits, orientation, palette)


def _values(image: Image.Image, path: Path) -> tuple[npt.NDArray[Any], str]:
    if image.mode in _WITH_ALPHA:
        return _split_alpha(np.asarray(image))
    if image.mode not in ("1", "L", "P") and not image.mode.startswith(("I", "F")):
        return np.array(image.convert("RGB")), "colors"
    values = np.asarray(image)
    if values.dtype.kind == "f":
        _require_whole(values, path)
    return values.astype(np.int32), "values"


def _require_whole(values: npt.NDArray[Any], path: Path) -> None:
    is_whole = np.isfinite(values)
    is_whole[is_whole] = (values[is_whole] % 1 == 0) & (np.abs(values[is_whole]) < 2**31)
    if not is_whole.all():
        raise DataError(f"{path}: has pixel values that are not integers; expected class ids.")


def _split_alpha(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], str]:
    """Drop the last channel of LA, PA or RGBA, or return only it if the others are constant."""
    content, alpha = values[..., :-1], values[..., -1]
    if (content == content[:1, :1]).all() and alpha.min() < alpha.max():
        return alpha.astype(np.int32), "alpha"
    if (content == content[:1, :1]).all() and alpha.max() == 0:
        return np.zeros(alpha.shape, np.int32), "alpha"  # an empty mask in the alpha channel
    if content.shape[2] == 1:
        return content[..., 0].astype(np.int32), "values"
    return content.copy(), "colors"


def _deep_values(deep: npt.NDArray[np.uint16], path: Path) -> tuple[npt.NDArray[Any], str]:
    """Return ids from equal 16-bit channels, colors from 16-bit colors that fit 8 bits."""
    if deep.shape[2] == 4:
        values, encoding = _split_alpha(deep)
        if encoding == "alpha":
            return values, encoding
    colors = deep[..., :3]
    if (colors == colors[..., :1]).all():
        return colors[..., 0].astype(np.int32), "values"
    high = colors >> 8
    if not ((colors == high * 257) | (colors == high << 8)).all():
        raise DataError(
            f"{path}: has 16-bit colors that do not fit in 8 bits; save it with 8 bits."
        )
    return high.astype(np.uint8), "colors"


def _palette(image: Image.Image) -> npt.NDArray[np.uint8] | None:
    colors = image.getpalette("RGB") if image.mode == "P" else None
    return None if not colors else np.array(colors, np.uint8).reshape(-1, 3)


def _gray_scale(image: Image.Image, path: Path) -> int:
    """Return the factor that Pillow applies to a gray PNG: 2-bit ids become 0, 85, 170, 255."""
    header = png_header(image, path)
    if header is None or image.mode != "L":
        return 1
    return {2: 85, 4: 17}.get(header[0], 1)
