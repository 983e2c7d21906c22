"""What pairing returns: `Splits` and `Pairing`; nothing here accesses the disk."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dcnseg.data.sample import FileProblem, Sample

SPLIT_NAMES: Final = ("train", "val", "test")
SPLIT_WORDS: Final = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Splits:
    """The samples of each split, sorted by stem; a missing split is empty."""

    train: tuple[Sample, ...] = ()
    val: tuple[Sample, ...] = ()  # for choosing the best weights
    test: tuple[Sample, ...] = ()  # for the final score
    layout: str = field(default="", compare=False)  # how images and masks were found, in words
    is_val_drawn: bool = field(default=False, compare=False)  # from train; there is no val split

    def all_samples(self) -> tuple[Sample, ...]:
        """Return the samples of all splits."""
        return self.train + self.val + self.test


@dataclass(frozen=True)
class Pairing:
    """The pairs of a data folder, and its unpaired files.

    For a missing image that a COCO file lists, `masks_without_image` has the path of that file and
    the image's name.
    """

    splits: Splits
    images_without_mask: tuple[Path, ...] = ()
    masks_without_image: tuple[Path, ...] = ()
    doubles: tuple[Path, ...] = ()  # have the role, split and stem of another file; in no pair
    layout: str = ""  # how images and masks were found, in words
    advice: str = ""  # what to do about unpaired files, with the exact patterns to try
    problems: tuple[FileProblem, ...] = ()  # in annotation files

    @property
    def is_whole(self) -> bool:
        """Whether every file has its partner, and the annotation files have no problems."""
        unpaired = self.images_without_mask or self.masks_without_image or self.doubles
        return not unpaired and not self.problems


@dataclass(frozen=True)
class Entry:
    """An image or a mask before pairing; `split` is empty if it is unknown."""

    path: Path
    split: str
    stem: str

    @property
    def key(self) -> tuple[str, str]:
        """The key that an image and its mask share."""
        return self.split, self.stem


@dataclass(frozen=True)
class Found:
    """The images and masks of a layout, before they are paired by their keys."""

    images: Sequence[Entry]
    masks: Sequence[Entry]
    layout: str
    advice: str = ""
    problems: tuple[FileProblem, ...] = ()


def join_entries(found: Found, *, val_fraction: float, seed: int) -> Pairing:
    """Pair images and masks with equal keys.

    If only some entries are in a split, the others are ignored, and `layout` gives their number.
    Without a val split, val is drawn from train by `seed`.
    """
    has_splits = any(entry.split for entry in found.images)
    layout = found.layout
    images, masks = found.images, found.masks
    if has_splits:
        num_ignored = sum(not entry.split for entry in images)
        images = [entry for entry in images if entry.split]
        masks = [entry for entry in masks if entry.split]
        if num_ignored:
            layout += f"; {num_ignored} images without a split are ignored"
    image_of, image_doubles = _by_key(images)
    mask_of, mask_doubles = _by_key(masks)
    doubled = {entry.key for entry in (*image_doubles, *mask_doubles)}
    by_split: dict[str, list[Sample]] = defaultdict(list)
    for key in sorted(image_of.keys() & mask_of.keys() - doubled):
        by_split[key[0] or "train"].append(Sample(image_of[key], mask_of[key], key[1]))
    train, val, test = (tuple(by_split.get(name, ())) for name in SPLIT_NAMES)
    is_val_drawn = bool(train) and not val
    if is_val_drawn:
        train, val = split_off_validation(train, val_fraction, seed)
    return Pairing(
        splits=Splits(train, val, test, layout, is_val_drawn),
        images_without_mask=tuple(sorted(image_of[k] for k in image_of.keys() - mask_of.keys())),
        masks_without_image=tuple(sorted(mask_of[k] for k in mask_of.keys() - image_of.keys())),
        doubles=tuple(sorted(entry.path for entry in (*image_doubles, *mask_doubles))),
        layout=layout,
        advice=found.advice,
        problems=found.problems,
    )


def _by_key(entries: Iterable[Entry]) -> tuple[dict[tuple[str, str], Path], list[Entry]]:
    """Return the path of each key, and the entries that share their key with others."""
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.key].append(entry)
    doubles = [entry for group in groups.values() if len(group) > 1 for entry in group]
    return {key: min(e.path for e in group) for key, group in groups.items()}, doubles


def split_off_validation(
    samples: tuple[Sample, ...], val_fraction: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Choose val by a hash of seed and stem: independent of file order and library versions."""
    count = round(len(samples) * val_fraction)
    if val_fraction > 0:
        count = min(max(count, 1), len(samples) - 1)
    ranked = sorted(
        samples,
        key=lambda s: hashlib.sha256(f"{seed}:{s.stem}".encode(errors="surrogateescape")).digest(),
    )
    chosen = {sample.stem for sample in ranked[:count]}
    train = tuple(sample for sample in samples if sample.stem not in chosen)
    return train, tuple(sample for sample in samples if sample.stem in chosen)
