from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dcnseg.data.check.near_duplicates import Picture, find_near_duplicates

UInt8Array = npt.NDArray[np.uint8]
RNG = np.random.default_rng(0)


def picture(split: str, file: str, thumbnail: UInt8Array, digest: str = "") -> Picture:
    return Picture(split, file, thumbnail.tobytes().hex(), digest or file)


def noise() -> UInt8Array:
    return RNG.integers(20, 230, (8, 9), np.uint8)


def found(*pictures: Picture) -> list[tuple[str, str, bool]]:
    pairs = find_near_duplicates(pictures)
    return [(pair.first.file, pair.second.file, pair.is_exact) for pair in pairs]


def test_nearly_equal_pictures_of_two_splits_are_found_whatever_their_brightness() -> None:
    first, other = noise(), noise()
    brighter = (first + RNG.integers(9, 12, first.shape)).astype(np.uint8)
    pictures = (
        picture("train", "a", first),
        picture("train", "b", brighter),
        picture("train", "c", other),
        picture("val", "d", brighter),
    )
    assert found(*pictures) == [("a", "d", False), ("b", "d", False)]


def test_equal_files_are_found_within_a_split() -> None:
    flat = np.full((8, 9), 7, np.uint8)
    pictures = (picture("train", "a", flat, "same"), picture("train", "b", flat, "same"))
    assert found(*pictures) == [("a", "b", True)]
    assert found(pictures[0]) == []


def test_pictures_without_contrast_are_not_taken_for_the_same() -> None:
    flat = np.full((8, 9), 7, np.uint8)
    assert found(picture("train", "a", flat), picture("val", "b", flat)) == []


def test_equal_signs_of_unequal_contrast_are_no_duplicates() -> None:
    steps = np.tile(np.arange(9, dtype=np.uint8), (8, 1))
    assert found(picture("train", "a", steps), picture("val", "b", steps * 25)) == []


def test_many_pictures_are_compared_in_blocks() -> None:
    thumbnails = RNG.integers(20, 230, (600, 8, 9), np.uint8)
    pictures = [picture("train", str(i), thumbnail) for i, thumbnail in enumerate(thumbnails)]
    pictures.append(picture("val", "twin", thumbnails[550]))
    assert found(*pictures) == [("550", "twin", False)]
