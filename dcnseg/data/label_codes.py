"""Lookup tables between the values in mask files and training indices.

`encode_by_id` and `encode_by_color` are used by `ClassMap`.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt

IGNORE_INDEX: Final = 255  # ignored pixels in training label maps, whose classes are 0..K-1
MAX_ID: Final = 65535  # limit of 16-bit masks
_UNKNOWN: Final = 256  # in the tables only, which are therefore uint16
_HUE_STEPS: Final = 8192  # gives about 2,800 distinct colors; more steps add hardly any
_NUM_COLORS: Final = 1 << 24
_COLOR_STRIDE: Final = 0x9E3779  # odd, so that its multiples modulo 2^24 reach every color

Color = tuple[int, int, int]
Counts = dict[int, int]
UInt8Array = npt.NDArray[np.uint8]


def encode_by_id(
    id_map: npt.NDArray[np.integer[Any]], ids: tuple[int, ...], ignored_ids: tuple[int, ...]
) -> tuple[UInt8Array, Counts]:
    """Convert ids to indices 0..K-1, 255 where ignored; count the pixels of every other value.

    Args:
        id_map: Integers of any width [H, W].
        ids: The id of each class, in the order of the indices.
        ignored_ids: The ids that become 255.

    Returns:
        The indices [H, W] (255 at unknown values) and the pixels per unknown value.
    """
    table = _id_table(ids, ignored_ids)
    if id_map.size and (id_map.min() < 0 or id_map.max() > MAX_ID):
        # Entry 65536 of the table is "unknown".
        safe = np.where((id_map < 0) | (id_map > MAX_ID), MAX_ID + 1, id_map)
        return _split_codes(table[safe], id_map)
    return _split_codes(table[id_map], id_map)


def encode_by_color(
    color_mask: UInt8Array, colors: tuple[Color, ...], ignored_colors: tuple[Color, ...]
) -> tuple[UInt8Array, Counts]:
    """Like `encode_by_id` for colors [H, W, 3]; the counts are keyed by `pack_color`."""
    red, green, blue = (color_mask[..., channel].astype(np.int32) for channel in range(3))
    packed = (red << 16) | (green << 8) | blue  # [H, W]
    codes = _color_table(colors, ignored_colors)[packed] ^ _UNKNOWN
    return _split_codes(codes, packed)


def _split_codes(
    codes: npt.NDArray[np.uint16], values: npt.NDArray[np.integer[Any]]
) -> tuple[UInt8Array, Counts]:
    is_unknown = codes == _UNKNOWN
    if not is_unknown.any():
        return codes.astype(np.uint8), {}
    found, counts = np.unique(values[is_unknown], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    unknown = {int(found[i]): int(counts[i]) for i in order}
    return np.where(is_unknown, IGNORE_INDEX, codes).astype(np.uint8), unknown


@lru_cache(maxsize=16)
def _id_table(ids: tuple[int, ...], ignored_ids: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    table = np.full(MAX_ID + 2, _UNKNOWN, np.uint16)
    table[list(ignored_ids)] = IGNORE_INDEX
    table[list(ids)] = np.arange(len(ids))
    return table


@lru_cache(maxsize=4)
def _color_table(
    colors: tuple[Color, ...], ignored_colors: tuple[Color, ...]
) -> npt.NDArray[np.uint16]:
    # One element per 24-bit color: 32 MB, most of which is never accessed. Searching a sorted list
    # of colors takes five times as long per image.
    # It holds code ^ 256, so that 0, an untouched page, is unknown.
    table = np.zeros(_NUM_COLORS, np.uint16)
    for color in ignored_colors:
        table[pack_color(color)] = IGNORE_INDEX ^ _UNKNOWN
    for index, color in enumerate(colors):
        table[pack_color(color)] = index ^ _UNKNOWN
    return table


def pack_color(color: Sequence[int]) -> int:
    """Return the color as one number, 0xRRGGBB."""
    red, green, blue = color
    return (red << 16) | (green << 8) | blue


def unpack_color(packed: int) -> Color:
    """Return (red, green, blue) of 0xRRGGBB."""
    return packed >> 16, (packed >> 8) & 255, packed & 255


def distinct_colors(count: int, taken: Sequence[Color] = ()) -> list[Color]:
    """Return `count` colors that differ from each other and from `taken`; deterministic.

    Raises:
        ValueError: There are fewer 24-bit colors than that.
    """
    used = set(taken)
    if count > _NUM_COLORS - len(used):
        raise ValueError(f"requested {count} colors; only {_NUM_COLORS - len(used)} are left")
    return list(islice(_unused(_all_colors(), used), count))


def _unused(colors: Iterable[Color], used: set[Color]) -> Iterator[Color]:
    for color in colors:
        if color not in used:
            used.add(color)
            yield color


def _all_colors() -> Iterator[Color]:
    """Yield every 24-bit color, easily distinguished ones first; some are repeated."""
    for step in range(_HUE_STEPS):
        hue = (0.58 + step * 0.6180339887) % 1.0  # the golden ratio spreads hues evenly
        saturation, value = ((0.75, 0.9), (0.55, 0.65), (0.9, 0.6), (0.4, 0.95))[step % 4]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        yield round(255 * red), round(255 * green), round(255 * blue)
    for step in range(_NUM_COLORS):
        yield unpack_color(step * _COLOR_STRIDE % _NUM_COLORS)
