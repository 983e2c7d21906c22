"""Data folders -> pairs of images and masks, in splits; entry points `find_splits`, `find_pairs`.

`layouts`, `patterns` and `pair_lists` decide how the pairs are found.
"""

from __future__ import annotations

import os
from pathlib import Path

from dcnseg.config import PairSource
from dcnseg.data.pairing.layouts import recognize
from dcnseg.data.pairing.listing import first_names
from dcnseg.data.pairing.pair_lists import read_pair_list
from dcnseg.data.pairing.patterns import match_patterns
from dcnseg.data.pairing.splits import Pairing, Splits, join_entries
from dcnseg.errors import ConfigError, DataError


def find_splits(
    root: Path, source: PairSource | None = None, *, val_fraction: float = 0.2, seed: int = 0
) -> Splits:
    """Find images and masks below `root`, as `find_pairs` does, and refuse unpaired files.

    Raises:
        DataError: An image has no mask, a mask has no image, or two files have the same name; gives
            their number and names. Also as `find_pairs`.
        ConfigError: As `find_pairs`.
    """
    pairing = find_pairs(root, source, val_fraction=val_fraction, seed=seed)
    message = describe_unpaired(pairing, root)
    if message:
        raise DataError(f"{root}: {message}")
    return pairing.splits


def find_pairs(
    root: Path, source: PairSource | None = None, *, val_fraction: float = 0.2, seed: int = 0
) -> Pairing:
    """Find images and masks below `root`; files without a partner are part of the result.

    The same names give the same split on every machine. Subfolders are searched. Hidden files and
    files that are not images are ignored.

    Args:
        root: The data folder.
        source: Where its images and masks are; None: the layout is detected.
        val_fraction: Fraction of the images for val if the data has no val split, in [0, 1). At
            least one image goes to val, and at least one stays in train.
        seed: Chooses the images for val.

    Raises:
        DataError: There are no images, the layout is ambiguous, a pattern matches nothing, or a
            list is wrong.
        ConfigError: `val_fraction` is out of range.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(
            f"`val_fraction` is {val_fraction}; it must be at least 0 and less than 1."
        )
    if not root.is_dir():
        what = "is not a folder" if os.path.lexists(root) else "does not exist"
        raise DataError(f"{root}: {what}; expected a folder with images and masks.")
    source = source or PairSource()
    if source.pairs is not None:
        found = read_pair_list(root, source.pairs)
    elif source.images:
        found = match_patterns(root, source.images, source.masks)
    else:
        found = recognize(root)
    return join_entries(found, val_fraction=val_fraction, seed=seed)


def describe_unpaired(pairing: Pairing, root: Path) -> str:
    """Describe files without a partner and double files in one sentence; empty if none."""
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
            f"{len(pairing.doubles)} files have the same name except for the extension "
            f"({first_names(pairing.doubles, root)}); names must be unique"
        )
    for problem in pairing.problems[:1]:
        rest = len(pairing.problems) - 1
        more = f" (and {rest} more problems; `dcnseg check` lists them)" if rest else ""
        parts.append(f"{problem.path}: {problem.what.rstrip('.')}{more}")
    return f"{'; '.join(parts)}. {pairing.advice}".strip() if parts else ""
