"""How the images and masks of a data folder are laid out; the entry point is `recognize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dcnseg.data.pairing.coco import find_coco, read_coco_files
from dcnseg.data.pairing.folder_names import PlacedFile, place_files
from dcnseg.data.pairing.known_layouts import find_cityscapes, find_voc, refuse_parent_folder
from dcnseg.data.pairing.listing import find_files, find_images, find_unsupported
from dcnseg.data.pairing.one_folder import read_one_folder
from dcnseg.data.pairing.readings import common_template, folder_of, read_folders
from dcnseg.data.pairing.splits import Found
from dcnseg.data.polygons.labelme import is_labelme
from dcnseg.errors import DataError


def recognize(root: Path) -> Found:
    """Find the images and masks of a data folder by the names of folders and files.

    In this order: PASCAL VOC, Cityscapes, folders named for images and for masks (in split folders,
    above them, or without), a COCO file, one folder with suffixes, LabelMe files.

    Raises:
        DataError: There are no images, or the names can be read in more than one way.
    """
    known = find_voc(root) or find_cityscapes(root)
    if known:
        return known
    image_files = place_files(root, find_images(root))
    if not image_files:
        raise DataError(
            f"{root}: has no images (.png, .jpg, .tif, ...).{_skipped(root)} Expected the folders "
            "images and masks, or train, val and test folders that contain them; for any other "
            "layout, pass --images and --masks."
        )
    refuse_parent_folder(root)
    json_files = place_files(root, find_files(root, {".json"}))
    reading = read_folders(root, image_files)
    if reading and (reading.choice.pairs or not json_files):
        return reading.to_found(len(image_files))
    coco_files, problems = read_coco_files([file.entry.path for file in json_files])
    if coco_files:
        return replace(find_coco(root, image_files, coco_files), problems=tuple(problems))
    reading = reading or read_one_folder(root, image_files)
    labelme = None
    if json_files and not (reading and reading.choice.pairs):
        labelme = _find_labelme(image_files, json_files)
    if labelme:
        return labelme
    found = reading.to_found(len(image_files)) if reading else _without_masks(image_files)
    return replace(found, problems=tuple(problems))


def _skipped(root: Path) -> str:
    """Name the files that are there instead of images."""
    unread = find_unsupported(root)
    if not unread:
        return ""
    path, reason = next(iter(unread.items()))
    more = f", and {len(unread) - 1} more" if len(unread) > 1 else ""
    return f" Skipped: {path.relative_to(root)} ({reason}){more}."


def _find_labelme(
    image_files: Sequence[PlacedFile], json_files: Sequence[PlacedFile]
) -> Found | None:
    """Pair images with JSON files of the same stem, beside them or in a folder of masks."""
    images = [file.entry for file in image_files if file.role != "mask"]
    keys = {entry.key for entry in images}
    masks = [f.entry for f in json_files if f.entry.key in keys or is_labelme(f.entry.path)]
    if not keys & {entry.key for entry in masks}:
        return None
    advice = "Each image needs a LabelMe file with the same name except for the extension."
    return Found(images, masks, "LabelMe JSON by name", advice)


def _without_masks(image_files: Sequence[PlacedFile]) -> Found:
    template = common_template(image_files)
    folder = folder_of(template).removeprefix("./")
    return Found(
        [file.entry for file in image_files],
        [],
        "no masks found",
        "There is no folder named masks, labels, annotations or gt, and no file with a suffix such "
        f"as _mask. Pass patterns such as --images '{template}' --masks '{folder}{{stem}}_mask.png'"
        ".",
    )
