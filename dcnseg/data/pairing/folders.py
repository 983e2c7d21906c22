"""Data folders -> pairs of images and masks, in splits; entry points `find_splits`, `find_pairs`.

How the pairs are found is decided in `layouts`, `patterns` and `pair_lists`.
"""

from __future__ import annotations

import os
from pathlib import Path

from dcnseg.config import check_pair_source
from dcnseg.data.pairing.layouts import recognize
from dcnseg.data.pairing.listing import find_images, first_names
from dcnseg.data.pairing.pair_lists import read_pair_list
from dcnseg.data.pairing.patterns import match_patterns
from dcnseg.data.pairing.samples import SPLIT_NAMES, Found, Pairing, Sample, Splits, join_entries
from dcnseg.errors import ConfigError, DataError

__all__ = [
    "SPLIT_NAMES",
    "Pairing",
    "Sample",
    "Splits",
    "find_images",
    "find_pairs",
    "find_splits",
    "pair_samples",
]


def find_splits(
    root: Path,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    images: str = "",
    masks: str = "",
    pairs: Path | None = None,
) -> Splits:
    """Find images and masks below `root`, as `find_pairs` does, and let nothing be left over.

    Args:
        root: The data folder.
        val_fraction: Share of the images that goes to val where the data names no val split, in
            [0, 1); at least one goes, and at least one stays in train.
        seed: Chooses which.
        images: Pattern of the images' paths, with {stem} and maybe {split}; empty: recognized.
        masks: Pattern of the masks' paths.
        pairs: List of pairs, instead of patterns.

    Raises:
        DataError: An image has no mask, a mask no image, or two files stand for the same one;
            says how many and which. Also as `find_pairs`.
        ConfigError: As `find_pairs`.
    """
    pairing = find_pairs(
        root, val_fraction=val_fraction, seed=seed, images=images, masks=masks, pairs=pairs
    )
    message = left_over(pairing, root)
    if message:
        raise DataError(f"{root}: {message}")
    return pairing.splits


def find_pairs(
    root: Path,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    images: str = "",
    masks: str = "",
    pairs: Path | None = None,
) -> Pairing:
    """Find images and masks below `root`; say what has no partner instead of refusing it.

    The same names give the same split on every machine. Subfolders are searched; hidden files and
    files that are no images are passed over. The arguments are those of `find_splits`.

    Raises:
        DataError: There are no images, the layout can be read in two ways, a pattern matches
            nothing, or a list is wrong.
        ConfigError: `val_fraction` is out of its range, a pattern is missing or has no {stem}, or
            patterns and a list are given.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(
            f"`val_fraction` is {val_fraction}; it must be at least 0 and less than 1."
        )
    check_pair_source(images, masks, pairs)
    if not root.is_dir():
        what = "is not a folder" if os.path.lexists(root) else "does not exist"
        raise DataError(f"{root}: {what}; expected a folder with images and masks.")
    found = _find(root, images, masks, pairs)
    return join_entries(found, val_fraction=val_fraction, seed=seed)


def _find(root: Path, images: str, masks: str, pairs: Path | None) -> Found:
    if pairs is not None:
        return read_pair_list(root, pairs)
    if images:
        return match_patterns(root, images, masks)
    return recognize(root)


def pair_samples(folder: Path) -> tuple[Sample, ...]:
    """Return all pairs of a data folder, whatever their split.

    Raises:
        DataError: See `find_splits`.
    """
    return find_splits(folder, val_fraction=0).all_samples()


def left_over(pairing: Pairing, root: Path) -> str:
    """Say in one sentence which files have no partner or are double; empty if none."""
    num_pairs = len(pairing.splits.all_samples())
    parts = []
    for files, what, partner in (
        (pairing.images_without_mask, "images", "mask"),
        (pairing.masks_without_image, "masks", "image"),
    ):
        if files:
            total = num_pairs + len(files)
            names = first_names(files, root)
            parts.append(f"{len(files)} of {total} {what} have no {partner} ({names})")
    if pairing.doubles:
        parts.append(
            f"{len(pairing.doubles)} files share their name but for the ending "
            f"({first_names(pairing.doubles, root)}); each name may stand there once"
        )
    for problem in pairing.problems[:1]:
        rest = len(pairing.problems) - 1
        more = f" (and {rest} more such problems; `dcnseg check` lists them)" if rest else ""
        parts.append(f"{problem.path}: {problem.what.rstrip('.')}{more}")
    return f"{'; '.join(parts)}. {pairing.advice}".strip() if parts else ""
