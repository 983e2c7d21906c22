"""Converts outlines and run lengths to pixels; entry points `fill_ring` and `decode_runs`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]


def fill_ring(size_hw: tuple[int, int], ring: npt.NDArray[np.float64]) -> BoolArray:
    """Return the pixels whose center is in a closed outline, bool [H, W].

    Polygons that share an edge have neither common pixels nor gaps. Self-intersecting outlines use
    the even-odd rule.

    Args:
        size_hw: Height and width of the result.
        ring: Corners (x, y), [N, 2]; (0, 0) is the upper left corner of the first pixel, and
            (0.5, 0.5) its center.
    """
    height, width = size_hw
    # Every crossing of a row's center line toggles the rest of the row; the additional column holds
    # the crossings beyond the right edge.
    turns = np.zeros((height, width + 1), np.int32)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        first, last = np.clip(np.ceil(np.array([y0, y1]) - 0.5), 0, height).astype(np.int64)
        rows = np.arange(first, last)
        x = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
        np.add.at(turns, (rows, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)), 1)
    return (np.cumsum(turns[:, :width], axis=1) & 1).astype(bool)


def decode_runs(size_hw: tuple[int, int], counts: Sequence[int] | str) -> BoolArray:
    """Return the pixels of COCO's run lengths, bool [H, W].

    Args:
        size_hw: Height and width of the image.
        counts: Lengths of alternating runs outside and inside, in column-major order, or their
            compressed text.

    Raises:
        ValueError: A length is negative, their sum is not H*W, or the text is damaged.
    """
    height, width = size_hw
    lengths = np.array(unpack_runs(counts) if isinstance(counts, str) else counts, np.int64)
    size = height * width
    # Check each length first: a sum of numbers near 2^63 may overflow.
    is_possible = lengths.ndim == 1 and ((lengths >= 0) & (lengths <= size)).all()
    if not is_possible or lengths.sum() != size:
        raise ValueError(f"the run lengths do not add up to {width}x{height} pixels")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def unpack_runs(text: str) -> list[int]:
    """Return the run lengths of a compressed COCO text.

    Each character encodes six bits, starting at "0" = 0: five bits of a number, the lowest first,
    and a continuation bit. The top bit of the last five is the sign. From the fourth number on,
    each is the difference from the number two places before.

    Raises:
        ValueError: A character is outside that range, or the text ends within a number.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the run lengths contain the character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > 60:
                raise ValueError("a run length has too many digits")
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the run lengths end within a number")
    return runs
