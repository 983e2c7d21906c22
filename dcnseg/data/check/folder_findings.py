"""Checks the files of a data folder without opening them; entry point `check_folder`."""

from __future__ import annotations

import os
from pathlib import Path

from dcnseg.data.check.findings import ERROR, WARNING, Finding
from dcnseg.data.class_map import find_class_list
from dcnseg.data.pairing.listing import written_by_dcnseg
from dcnseg.data.pairing.splits import Pairing
from dcnseg.files import OUTPUT_MARKER


def check_folder(root: Path, pairing: Pairing) -> list[Finding]:
    """Find unpaired and double files, too few pairs, misplaced class lists and output folders."""
    has_others = pairing.masks_without_image or pairing.doubles or pairing.problems
    if not pairing.splits.all_samples() and not has_others:
        return [_no_masks(root, pairing)]
    return (
        _unpaired(pairing)
        + _too_few(root, pairing)
        + _class_list_above(root)
        + _unmarked_outputs(pairing)
    )


def _no_masks(root: Path, pairing: Pairing) -> Finding:
    count = len(pairing.images_without_mask)
    what = f"has no masks, only {count} image{'s' * (count != 1)}."
    advice = (
        f"To label these with a trained network, use `dcnseg predict RUN {root} --out OUT`. "
        f"To train on them, they need masks. {pairing.advice}"
    )
    return Finding(ERROR, "no-masks", str(root), what, advice)


def _unpaired(pairing: Pairing) -> list[Finding]:
    same_name = "has the same name as another file except for the extension."
    groups = (
        ("image-without-mask", pairing.images_without_mask, "has no mask."),
        ("mask-without-image", pairing.masks_without_image, "has no image."),
        ("double-name", pairing.doubles, same_name),
    )
    return [
        Finding(ERROR, kind, str(path), what, "" if index else pairing.advice)
        for kind, paths, what in groups
        for index, path in enumerate(paths)
    ]


def _too_few(root: Path, pairing: Pairing) -> list[Finding]:
    splits = pairing.splits
    if len(splits.train) >= 2 and splits.val:
        return []
    what = (
        f"has {len(splits.train)} image/mask pairs for training and {len(splits.val)} for "
        "validation; expected at least 2 and 1."
    )
    return [Finding(ERROR, "too-few", str(root), what)]


def _class_list_above(root: Path) -> list[Finding]:
    """Warn if DATA is the folder of a split and the class list is in the folder above."""
    above = root.parent if root.name not in ("", "..") else root.resolve().parent
    class_list = find_class_list(above)
    if class_list is None or find_class_list(root) is not None or written_by_dcnseg(above):
        return []
    what = f"has no class list, and {class_list} in the parent folder is not read."
    advice = f"Pass {os.path.normpath(above)} as DATA, or copy the list to {root}."
    return [Finding(WARNING, "class-list-above", str(root), what, advice)]


def _unmarked_outputs(pairing: Pairing) -> list[Finding]:
    """Warn if masks are in a folder like the unmarked outputs of early versions of predict.

    Such a folder is not skipped: it may also contain annotated masks.
    """
    folders = {sample.mask.parent for sample in pairing.splits.all_samples()}
    likely = {
        above.parent
        for folder in folders
        for above in (folder, *folder.parents)
        if above.name == "labels" and _is_like_output(above.parent)
    }
    what = (
        "has labels/ and overlays/ like the output of dcnseg predict; the labels are used as masks."
    )
    advice = (
        f"If it is the output of dcnseg predict, skip it by creating an empty file {OUTPUT_MARKER} "
        "in it."
    )
    return [Finding(WARNING, "likely-output", str(path), what, advice) for path in sorted(likely)]


def _is_like_output(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return "overlays" in names and names <= {"labels", "overlays", "probabilities", "confidence"}
