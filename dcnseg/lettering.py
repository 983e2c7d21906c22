"""Text on images, in Pillow's built-in font."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

WHITE: Final[Color] = (255, 255, 255)
INK: Final[Color] = (28, 30, 36)


def write(
    rgb: npt.NDArray[np.uint8],
    text: str,
    corner_xy: tuple[int, int],
    size: int,
    color: Color = INK,
) -> None:
    """Draw one line of text in place, with its upper left corner at `corner_xy`."""
    sheet = Image.fromarray(rgb)
    ImageDraw.Draw(sheet).text(corner_xy, text, fill=color, font=_font(size))
    rgb[:] = np.asarray(sheet)


def text_width(text: str, size: int) -> int:
    """Return the width of a line of text in pixels."""
    return math.ceil(_font(size).getlength(text))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
