"""Look-up tables between the values in mask files and training indices.

`encode_by_id` and `encode_by_colour` do the work of `ClassMap`; nothing here knows about names.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt

IGNORE_INDEX: Final = 255  # of ignored pixels in training label maps, whose classes are 0..K-1
MAX_ID: Final = 65535  # what a 16-bit mask can hold
_UNKNOWN: Final = 256  # in the tables only, which are therefore uint16
_HUE_STEPS: Final = 8192  # give some 2,800 different colors; more steps give hardly any new ones
_NUM_COLOURS: Final = 1 << 24
_COLOUR_STRIDE: Final = 0x9E3779  # odd, so that its multiples modulo 2^24 are all the colors

Colour = tuple[int, int, int]
Counts = dict[int, int]
UInt8Array = npt.NDArray[np.uint8]


def encode_by_id(
    id_map: npt.NDArray[np.integer[Any]], ids: tuple[int, ...], ignored_ids: tuple[int, ...]
) -> tuple[UInt8Array, Counts]:
    """Turn ids into indices 0..K-1, 255 where ignored; count the pixels of every other value.

    Args:
        id_map: Integers of any width, [H, W].
        ids: The id of each class, in the order of the indices.
        ignored_ids: The ids to turn into 255.

    Returns:
        The indices [H, W] (255 at unknown values) and the pixels per unknown value.
    """
    table = _id_table(ids, ignored_ids)
    if id_map.size and (id_map.min() < 0 or id_map.max() > MAX_ID):
        # Entry 65536 of the table is "unknown".
        safe = np.where((id_map < 0) | (id_map > MAX_ID), MAX_ID + 1, id_map)
        return _split_codes(table[safe], id_map)
    return _split_codes(table[id_map], id_map)


def encode_by_colour(
    colour_mask: UInt8Array, colours: tuple[Colour, ...], ignored_colours: tuple[Colour, ...]
) -> tuple[UInt8Array, Counts]:
    """Do the same as `encode_by_id` for colours [H, W, 3]; the counts go by `pack_colour`."""
    red, green, blue = (colour_mask[..., channel].astype(np.int32) for channel in range(3))
    packed = (red << 16) | (green << 8) | blue  # [H, W]
    codes = _colour_table(colours, ignored_colours)[packed] ^ _UNKNOWN
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
def _colour_table(
    colours: tuple[Colour, ...], ignored_colours: tuple[Colour, ...]
) -> npt.NDArray[np.uint16]:
    # One entry per 24-bit colour: 32 MB that are mapped but mostly never touched. Searching a
    # sorted list of colours takes five times as long per picture.
    table = np.zeros(_NUM_COLOURS, np.uint16)  # holds code ^ 256: 0, the untouched page, is unknown
    for colour in ignored_colours:
        table[pack_colour(colour)] = IGNORE_INDEX ^ _UNKNOWN
    for index, colour in enumerate(colours):
        table[pack_colour(colour)] = index ^ _UNKNOWN
    return table


def pack_colour(colour: Sequence[int]) -> int:
    """Return the colour as one number, 0xRRGGBB."""
    red, green, blue = colour
    return (red << 16) | (green << 8) | blue


def unpack_colour(packed: int) -> Colour:
    """Return (red, green, blue) of 0xRRGGBB."""
    return packed >> 16, (packed >> 8) & 255, packed & 255


def distinct_colours(count: int, taken: Sequence[Colour] = ()) -> list[Colour]:
    """Return `count` colors that differ from each other and from `taken`, always the same ones.

    Raises:
        ValueError: There are not so many 24-bit colors.
    """
    used = set(taken)
    if count > _NUM_COLOURS - len(used):
        raise ValueError(f"{count} colors are wanted; {_NUM_COLOURS - len(used)} are left")
    return list(islice(_unused(_all_colours(), used), count))


def _unused(colours: Iterable[Colour], used: set[Colour]) -> Iterator[Colour]:
    for colour in colours:
        if colour not in used:
            used.add(colour)
            yield colour


def _all_colours() -> Iterator[Colour]:
    """Yield every 24-bit color, those first that are easy to tell apart; some come twice."""
    for step in range(_HUE_STEPS):
        hue = (0.58 + step * 0.6180339887) % 1.0  # the golden ratio spreads hues evenly
        saturation, value = ((0.75, 0.9), (0.55, 0.65), (0.9, 0.6), (0.4, 0.95))[step % 4]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        yield round(255 * red), round(255 * green), round(255 * blue)
    for step in range(_NUM_COLOURS):
        yield unpack_colour(step * _COLOUR_STRIDE % _NUM_COLOURS)
