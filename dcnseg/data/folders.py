"""Folders of pictures and masks -> pairs, in splits; the entry point is `find_splits`."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dcnseg.data.image_io import IMAGE_SUFFIXES
from dcnseg.errors import ConfigError, DataError

SPLIT_NAMES: Final = ("train", "val", "test")
_SKIPPED_FOLDERS: Final = frozenset({"__MACOSX", "__pycache__"})


@dataclass(frozen=True)
class Sample:
    """A picture and its mask; `stem` is their common relative path without ending, "sub/a"."""

    image: Path
    mask: Path
    stem: str


@dataclass(frozen=True)
class Splits:
    """The samples of each split, sorted by stem; a split that is not there is empty."""

    train: tuple[Sample, ...] = ()
    val: tuple[Sample, ...] = ()
    test: tuple[Sample, ...] = ()

    def all_samples(self) -> tuple[Sample, ...]:
        """Return the samples of all splits."""
        return self.train + self.val + self.test


def find_splits(root: Path, *, val_fraction: float = 0.2, seed: int = 0) -> Splits:
    """Find `root/{train,val,test}/{images,masks}`, or split `root/{images,masks}` by `seed`.

    A train folder without a val folder is split too. The same names give the same split on every
    machine. Subfolders are searched; hidden files and files that are no pictures are passed over.

    Args:
        root: The data folder.
        val_fraction: Share of the pictures that goes to val where there is no val folder, in
            [0, 1); at least one goes, and at least one stays in train.
        seed: Chooses which.

    Raises:
        DataError: A folder is missing or empty, a picture has no mask, a mask no picture, or two
            files of a folder have the same stem; says how many and which.
        ConfigError: `val_fraction` is out of its range.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(
            f"`val_fraction` is {val_fraction}; it must be at least 0 and less than 1."
        )
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder.")
    found = {name: pair_samples(root / name) for name in SPLIT_NAMES if (root / name).is_dir()}
    if not found:
        train, val = _split(pair_samples(root), val_fraction, seed)
        return Splits(train, val)
    if "train" in found and "val" not in found:
        found["train"], found["val"] = _split(found["train"], val_fraction, seed)
    return Splits(**found)


def pair_samples(folder: Path) -> tuple[Sample, ...]:
    """Pair `folder/images` with `folder/masks` by stem, sorted by it.

    Raises:
        DataError: See `find_splits`.
    """
    images, masks = folder / "images", folder / "masks"
    for needed in (images, masks):
        if not needed.is_dir():
            raise DataError(
                f"{needed}: there is no such folder; {folder} needs the folders images and masks, "
                "or train, val and test folders that hold these."
            )
    image_files, mask_files = _files_by_stem(images), _files_by_stem(masks)
    if not image_files and not mask_files:
        raise DataError(f"{images}: holds no pictures; their names end in .png, .jpg, .tif or so.")
    without_mask = sorted(image_files.keys() - mask_files.keys())
    without_image = sorted(mask_files.keys() - image_files.keys())
    if without_mask or without_image:
        parts = []
        if without_mask:
            names = _first_names([image_files[stem] for stem in without_mask], folder)
            parts.append(f"{len(without_mask)} of {len(image_files)} images have no mask ({names})")
        if without_image:
            names = _first_names([mask_files[stem] for stem in without_image], folder)
            parts.append(f"{len(without_image)} of {len(mask_files)} masks have no image ({names})")
        raise DataError(
            f"{folder}: {'; '.join(parts)}. An image and its mask must have the same name apart "
            "from the ending."
        )
    return tuple(Sample(image_files[s], mask_files[s], s) for s in sorted(image_files))


def _split(
    samples: tuple[Sample, ...], val_fraction: float, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Choose val by a hash of seed and stem, which no file order or library version changes."""
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


def _files_by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    doubles: list[Path] = []
    for path in find_images(folder):
        relative = path.relative_to(folder)
        # One file system writes "ü" as one character, the next as two: NFC makes them equal.
        stem = unicodedata.normalize("NFC", relative.with_suffix("").as_posix())
        if stem in files:
            doubles += [files[stem], path]
        files[stem] = path
    if doubles:
        raise DataError(
            f"{folder}: {len(doubles)} files share their name but for the ending "
            f"({_first_names(doubles, folder)}); each name may stand there once."
        )
    return files


def find_images(folder: Path) -> list[Path]:
    """Return the picture files in `folder` and its subfolders, sorted, without hidden ones."""
    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [n for n in folders if not n.startswith(".") and n not in _SKIPPED_FOLDERS]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def _first_names(paths: Sequence[Path], folder: Path) -> str:
    names = [path.relative_to(folder).as_posix() for path in paths[:5]]
    return ", ".join(names) + (", ..." if len(paths) > 5 else "")
