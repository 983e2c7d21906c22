"""Finds equal and nearly equal images; the entry point is `find_near_duplicates`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

_CELLS: Final = 8 * 9  # of a thumbnail
_MAX_BITS: Final = 4  # of 64 that may differ in the hashes of nearly equal images
_MAX_DIFFERENCE: Final = 3  # mean difference of nearly equal thumbnails, in gray levels
_MIN_CONTRAST: Final = 2.0  # standard deviation below which all thumbnails look alike
_FEW_CELLS: Final = 8  # enough to distinguish most thumbnails
# Hashes that differ in at most 4 bits are equal in at least one of these 5 bands of bits.
_BANDS: Final = tuple(
    np.uint64((1 << end) - (1 << start)) for start, end in pairwise((0, 13, 26, 39, 52, 64))
)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageSignature:
    """An image of a split, with its thumbnail uint8 [8, 9] and the digest of its file, as hex."""

    split: str
    file: str
    thumbnail: str
    digest: str


@dataclass(frozen=True)
class DuplicateGroup:
    """Two or more images, in order; `is_exact` if their files are equal byte by byte."""

    images: tuple[ImageSignature, ...]
    is_exact: bool

    @property
    def is_across_splits(self) -> bool:
        """Whether they are in more than one split."""
        return len({image.split for image in self.images}) > 1


def find_near_duplicates(images: Sequence[ImageSignature]) -> list[DuplicateGroup]:
    """Find equal files anywhere, and images of different splits that look nearly the same.

    Two images look the same if at most 4 of the 64 signs of the horizontal differences in their
    thumbnails differ, and the mean difference of the thumbnails, after subtracting their mean, is
    at most 3 gray levels. Images with very low contrast count only if their files are equal. Pairs
    that share an image are joined into one group.

    Returns:
        The groups in the order of their first images.
    """
    groups = [(group, True) for group in _grouped([image.digest for image in images])]
    groups += [
        (group, False)
        for group in _near_groups(images)
        if len({images[index].digest for index in group}) > 1  # else it is an exact group
    ]
    return [
        DuplicateGroup(tuple(images[index] for index in group), is_exact)
        for group, is_exact in sorted(groups)
    ]


def _grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return the positions of each key that occurs more than once."""
    positions: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        positions[key].append(index)
    return [group for group in positions.values() if len(group) > 1]


def _near_groups(images: Sequence[ImageSignature]) -> list[list[int]]:
    """Return the positions of nearly equal images, by group."""
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        members[image.thumbnail, image.split].append(index)
    keys = list(members)
    if len({split for _, split in keys}) < 2:
        return []
    nodes = _Nodes.of([thumbnail for thumbnail, _ in keys], [split for _, split in keys])
    return [sorted(i for node in group for i in members[keys[node]]) for group in nodes.groups()]


@dataclass(frozen=True)
class _Nodes:
    """The distinct thumbnails of each split.

    `centered` are the gray levels minus their mean, times 72 to make them integers; the cells in
    which thumbnails differ most come first.
    """

    splits: IntArray  # index of the split, [N]
    hashes: npt.NDArray[np.uint64]  # 64 signs of differences, [N]
    centered: npt.NDArray[np.int32]  # [N, 72]
    has_contrast: npt.NDArray[np.bool_]  # whether the thumbnail is compared, [N]

    @classmethod
    def of(cls, thumbnails: Sequence[str], splits: Sequence[str]) -> _Nodes:
        """Compute the values that are compared."""
        levels = np.frombuffer(bytes.fromhex("".join(thumbnails)), np.uint8).reshape(-1, _CELLS)
        signs = np.diff(levels.reshape(-1, 8, 9).astype(np.int16), axis=2) > 0
        centered = levels.astype(np.int32) * _CELLS - levels.sum(axis=1, dtype=np.int32)[:, None]
        return cls(
            np.unique(splits, return_inverse=True)[1],
            np.packbits(signs.reshape(-1, 64), axis=1).view(np.uint64)[:, 0],
            centered[:, np.argsort(-centered.std(axis=0), kind="stable")],
            levels.std(axis=1) >= _MIN_CONTRAST,
        )

    def groups(self) -> Iterator[list[int]]:
        """Yield the groups of nodes connected by near pairs in different splits.

        A node that belongs to a group leaves all buckets, so that N similar images take N
        comparisons and not N^2.
        """
        if not self.has_contrast.any():
            return
        is_taken = ~self.has_contrast
        keys = [(self.hashes & band).tolist() for band in _BANDS]
        buckets = [self._buckets(band) for band in _BANDS]
        for start in np.flatnonzero(self.has_contrast).tolist():
            if is_taken[start]:
                continue
            is_taken[start] = True
            group = [start]
            for node in group:  # grows in the loop
                for index in range(len(_BANDS)):
                    key = keys[index][node]
                    bucket = buckets[index].get(key)
                    if bucket is not None:
                        buckets[index][key] = others = bucket[~is_taken[bucket]]
                        near = self._near(node, others, _BANDS[:index])
                        is_taken[near] = True
                        group += near.tolist()
            if len(group) > 1:
                yield group

    def _buckets(self, band: np.uint64) -> dict[int, IntArray]:
        """Return the nodes by a band of their hashes, for bands with two or more nodes."""
        used = np.flatnonzero(self.has_contrast)
        keys = self.hashes[used] & band
        order = np.argsort(keys, kind="stable")
        found, first = np.unique(keys[order], return_index=True)
        parts = np.split(used[order], first[1:])
        return {key: part for key, part in zip(found.tolist(), parts, strict=True) if len(part) > 1}

    def _near(self, node: int, others: IntArray, compared: Sequence[np.uint64]) -> IntArray:
        """Return those of `others` that look nearly the same, without equal `compared` bands."""
        others = others[self.splits[others] != self.splits[node]]
        if not len(others):
            return others
        changed = self.hashes[others] ^ self.hashes[node]
        is_near = np.bitwise_count(changed) <= _MAX_BITS
        for band in compared:
            is_near &= (changed & band) != 0
        others = others[is_near]
        for count in (_FEW_CELLS, _CELLS):
            differences = np.abs(self.centered[others, :count] - self.centered[node, :count])
            others = others[differences.sum(axis=1) <= _MAX_DIFFERENCE * _CELLS * _CELLS]
        return others
