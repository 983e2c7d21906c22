"""The same or nearly the same picture twice; the entry point is `find_near_duplicates`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_MAX_BITS: Final = 4  # of 64 that may differ in the hashes of nearly equal pictures
_MAX_DIFFERENCE: Final = 3.0  # mean difference of nearly equal thumbnails, in grey levels
_MIN_CONTRAST: Final = 2.0  # standard deviation below which all thumbnails look alike
_ROWS: Final = 512  # compared at once


@dataclass(frozen=True)
class Picture:
    """A picture of a split, with its thumbnail uint8 [8, 9] and the digest of its file, as hex."""

    split: str
    file: str
    thumbnail: str
    digest: str


@dataclass(frozen=True)
class DuplicatePair:
    """Two pictures; `is_exact` if their files are equal byte by byte."""

    first: Picture
    second: Picture
    is_exact: bool


def find_near_duplicates(pictures: Sequence[Picture]) -> list[DuplicatePair]:
    """Find equal files anywhere, and pictures of different splits that look nearly the same.

    Pictures look the same if of the 64 signs of the horizontal differences in their thumbnails at
    most 4 differ, and the thumbnails by at most 3 grey levels in the mean after levelling their
    brightness. Pictures almost without contrast are left out, unless the files are equal.

    Returns:
        The pairs in the order of the pictures.
    """
    if len(pictures) < 2:
        return []
    splits = np.array([picture.split for picture in pictures])
    digests = np.array([picture.digest for picture in pictures])
    thumbs = np.array(
        [np.frombuffer(bytes.fromhex(p.thumbnail), np.uint8) for p in pictures], np.float32
    )
    signs = np.diff(thumbs.reshape(len(pictures), 8, 9), axis=2) > 0
    hashes = np.packbits(signs.reshape(len(pictures), 64), axis=1).view(np.uint64)[:, 0]
    levelled = thumbs - thumbs.mean(axis=1, keepdims=True)
    has_contrast = levelled.std(axis=1) >= _MIN_CONTRAST
    pairs = []
    for i, j in _candidates(splits, digests, hashes):
        is_exact = bool(digests[i] == digests[j])
        is_near = has_contrast[i] and has_contrast[j] and splits[i] != splits[j]
        is_near = is_near and np.abs(levelled[i] - levelled[j]).mean() <= _MAX_DIFFERENCE
        if is_exact or is_near:
            pairs.append(DuplicatePair(pictures[i], pictures[j], is_exact))
    return pairs


def _candidates(
    splits: npt.NDArray[Any], digests: npt.NDArray[Any], hashes: npt.NDArray[np.uint64]
) -> Iterator[tuple[int, int]]:
    """Yield the pairs i < j with equal files, or nearly equal hashes in different splits."""
    for start in range(0, len(hashes), _ROWS):
        rows = slice(start, start + _ROWS)
        bits = np.bitwise_count(hashes[rows, None] ^ hashes[None])
        found = (bits <= _MAX_BITS) & (splits[rows, None] != splits[None])
        found |= digests[rows, None] == digests[None]
        for i, j in zip(*np.nonzero(found), strict=True):
            if start + i < j:
                yield int(start + i), int(j)
