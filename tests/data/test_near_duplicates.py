from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

from dcnseg.data.check.near_duplicates import ImageSignature, find_near_duplicates

UInt8Array = npt.NDArray[np.uint8]
RNG = np.random.default_rng(0)


def image(split: str, file: str, thumbnail: UInt8Array, digest: str = "") -> ImageSignature:
    return ImageSignature(split, file, thumbnail.tobytes().hex(), digest or file)


def noise() -> UInt8Array:
    return RNG.integers(20, 230, (8, 9), np.uint8)


def found(*images: ImageSignature) -> list[tuple[str, bool]]:
    groups = find_near_duplicates(images)
    return [("".join(p.file for p in group.images), group.is_exact) for group in groups]


def test_nearly_equal_images_of_two_splits_are_found_whatever_their_brightness() -> None:
    first, other = noise(), noise()
    brighter = (first + RNG.integers(9, 12, first.shape)).astype(np.uint8)
    images = (
        image("train", "a", first),
        image("train", "b", brighter),
        image("train", "c", other),
        image("val", "d", brighter),
    )
    assert found(*images) == [("abd", False)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_equal_files_are_one_group_however_many(split: str) -> None:
    flat = np.full((8, 9), 7, np.uint8)
    images = [image("train", name, flat, "same") for name in "abc"]
    [group] = find_near_duplicates([*images, image(split, "d", flat, "same")])
    assert group.is_exact
    assert group.is_across_splits == (split == "val")
    assert found(images[0]) == found() == []


def are_near(first: ImageSignature, second: ImageSignature) -> bool:
    """What `find_near_duplicates` promises, for one pair."""
    pair = [bytes.fromhex(p.thumbnail) for p in (first, second)]
    levels = np.array([list(content) for content in pair], float).reshape(2, 8, 9)
    signs = np.diff(levels, axis=2) > 0
    levelled = levels - levels.mean(axis=(1, 2), keepdims=True)
    return bool(
        first.split != second.split
        and (signs[0] != signs[1]).sum() <= 4
        and levelled.std(axis=(1, 2)).min() >= 2
        and abs(levelled[0] - levelled[1]).sum() <= 3 * 72 + 1e-9
    )


def by_brute_force(images: list[ImageSignature]) -> set[tuple[frozenset[str], bool]]:
    """Compare each image with each other one."""
    groups = set()
    for digest in {p.digest for p in images}:
        same = frozenset(p.file for p in images if p.digest == digest)
        groups |= {(same, True)} if len(same) > 1 else set()
    group_of = {p.file: {p.file} for p in images}
    for first, second in combinations(images, 2):
        if are_near(first, second):
            group_of[first.file] |= group_of[second.file]
            for file in group_of[first.file]:
                group_of[file] = group_of[first.file]
    digest_of = {p.file: p.digest for p in images}
    for group in group_of.values():
        if len({digest_of[file] for file in group}) > 1:
            groups.add((frozenset(group), False))
    return groups


def some_images(rng: np.random.Generator) -> list[ImageSignature]:
    """Variants of a few scenes, from the same to too different, many with large even areas."""
    splits = ["train", "val", "test"][: rng.integers(1, 4)]
    even_rows = int(rng.integers(0, 8))
    top = int(rng.choice([3, 6, 12, 250]))  # contrast
    images: list[ImageSignature] = []
    for _ in range(rng.integers(1, 5)):
        scene = rng.integers(0, top, (8, 9))
        scene[:even_rows] = 5
        for _ in range(rng.integers(1, 9)):
            variant = scene + rng.integers(0, 1 + rng.choice([0, 2, 7, 60]), (8, 9))
            variant = scene if rng.random() < 0.2 else np.clip(variant + rng.integers(0, 9), 0, 255)
            name = str(len(images))
            digest = rng.choice(["x", "y", name]) if rng.random() < 0.2 else name
            split = str(rng.choice(splits))
            images.append(image(split, name, variant.astype(np.uint8), str(digest)))
    return images


@pytest.mark.parametrize("seed", range(20))
def test_the_same_groups_are_found_as_by_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_near = 0
    for _ in range(10):
        images = some_images(rng)
        groups = find_near_duplicates(images)
        expected = by_brute_force(images)
        as_sets = [(frozenset(p.file for p in g.images), g.is_exact) for g in groups]
        assert set(as_sets) == expected
        assert len(as_sets) == len(expected)
        firsts = [int(group.images[0].file) for group in groups]
        assert firsts == sorted(firsts)
        num_near += sum(not group.is_exact for group in groups)
    assert num_near


@pytest.mark.parametrize("num_changed", [4, 5])
def test_up_to_four_signs_may_differ(num_changed: int) -> None:
    """Wherever in the hash they stand; five signs never share all five bands."""
    first = np.tile(np.array([10, 12, 10, 12, 10, 12, 10, 12, 10], np.uint8), (8, 1)) * 5
    for seed in range(60):
        second = first.copy()
        rows = np.random.default_rng(seed).permutation(8)[:num_changed]
        columns = np.random.default_rng(seed).integers(0, 2, num_changed) * 8
        second[rows, columns] = 61  # turns one sign of that row
        images = [image("train", "a", first), image("val", "b", second)]
        assert bool(find_near_duplicates(images)) == (num_changed == 4)


def test_many_images_that_are_all_alike_are_one_group() -> None:
    """Half a million pairs, which must not be compared one by one."""
    thumbnails = noise() + RNG.integers(0, 3, (1000, 8, 9), np.uint8)
    images = [
        image(("train", "val")[i % 2], str(i), thumbnail) for i, thumbnail in enumerate(thumbnails)
    ]
    [group] = find_near_duplicates(images)
    assert group.images == tuple(images)
