"""The layouts of PASCAL VOC and Cityscapes; entry points `find_voc` and `find_cityscapes`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from dcnseg.data.image_file import IMAGE_SUFFIXES
from dcnseg.data.pairing.listing import find_images, is_data_folder
from dcnseg.data.pairing.patterns import match_patterns
from dcnseg.data.pairing.splits import SPLIT_NAMES, Entry, Found
from dcnseg.data.sample import to_nfc
from dcnseg.errors import DataError
from dcnseg.files import explain_unreadable, read_text

_LISTS: Final = Path("ImageSets", "Segmentation")


def find_voc(root: Path) -> Found | None:
    """Find the images of `ImageSets/Segmentation/{train,val,test}.txt` if a folder has this layout.

    Images that no list names are ignored. Without lists, and with trainval.txt alone, the images
    belong to no split; without lists, those without a mask are ignored. A test list is ignored if
    none of its images has a mask: those of VOC were never published.

    Raises:
        DataError: There are two folders of masks, or a list cannot be read or names a missing file.
    """
    if not is_data_folder(root / "JPEGImages"):
        return None
    candidates = sorted(path for path in root.glob("SegmentationClass*") if is_data_folder(path))
    folders = [path for path in candidates if find_images(path)]
    if not folders:
        return None
    if len(folders) > 1:
        first, second = (f"'{folder.name}/{{stem}}.png'" for folder in folders[:2])
        raise DataError(
            f"{root}: can be read in two ways, with the masks {first} or {second}. Pass patterns "
            f"to choose one: --images 'JPEGImages/{{stem}}.jpg' --masks {first}"
        )
    images, masks = _by_name(root / "JPEGImages"), _by_name(folders[0])
    layout = f"VOC: JPEGImages/ + {folders[0].name}/"
    lists = _read_lists(root / _LISTS)
    if not lists:
        names = images.keys() & masks.keys()
        num_others = len(images) - len(names)
        layout += f", {num_others} images without masks are ignored" if num_others else ""
        return Found(
            [Entry(images[name], "", name) for name in names],
            [Entry(path, "", name) for name, path in masks.items()],
            layout,
            "Each mask needs an image of the same name.",
        )
    if not any(name in masks for name in lists.get("test", ())):
        ignored = lists.pop("test", [])
        layout += f", {len(ignored)} test images without masks are ignored" if ignored else ""
    return Found(
        list(_listed(root, images, lists)),
        [e for split, names in lists.items() for e in _present(masks, split, names)],
        f"{layout}, splits by {_LISTS.as_posix()}",
        f"Each name in {_LISTS.as_posix()} needs an image and a mask.",
    )


def _by_name(folder: Path) -> dict[str, Path]:
    return {_stem(path.relative_to(folder)): path for path in find_images(folder)}


def _stem(path: Path) -> str:
    is_image = path.suffix.lower() in IMAGE_SUFFIXES  # "frame.01" has no extension
    return to_nfc((path.with_suffix("") if is_image else path).as_posix())


def _read_lists(folder: Path) -> dict[str, list[str]]:
    """Return the names by split; without train.txt, trainval.txt counts as no split."""
    found = {name: _read_names(folder / f"{name}.txt") for name in SPLIT_NAMES}
    lists = {split: names for split, names in found.items() if names}
    if "train" not in lists and "val" not in lists:
        both = _read_names(folder / "trainval.txt")
        return {"": both} if both else lists
    return lists


def _read_names(path: Path) -> list[str]:
    if not os.path.lexists(path):
        return []
    with explain_unreadable(path, "a readable list"):
        lines = read_text(path).splitlines()
    # "2007_000032", or "/JPEGImages/2007_000032.jpg /SegmentationClass/2007_000032.png".
    names = [line.split()[0].rpartition("JPEGImages/")[2] for line in lines if line.split()]
    return list(dict.fromkeys(_stem(Path(name)) for name in names))


def _listed(root: Path, images: dict[str, Path], lists: dict[str, list[str]]) -> Iterator[Entry]:
    for split, names in lists.items():
        missing = [name for name in names if name not in images]
        if missing:
            raise DataError(
                f"{root / _LISTS / (split or 'trainval')}.txt: lists {len(missing)} images that "
                f"are not in JPEGImages ({', '.join(missing[:5])}). Add them, or remove the lines."
            )
        yield from _present(images, split, names)


def _present(paths: dict[str, Path], split: str, names: Sequence[str]) -> list[Entry]:
    return [Entry(paths[name], split, name) for name in names if name in paths]


def find_cityscapes(root: Path) -> Found | None:
    """Find the images of leftImg8bit and the masks of gtFine or gtCoarse.

    The labelTrainIds are taken if every image has them, else the labelIds.
    """
    fine = next((n for n in ("gtFine", "gtCoarse") if is_data_folder(root / n)), None)
    if fine is None or not is_data_folder(root / "leftImg8bit"):
        return None
    images = "leftImg8bit/{split}/{stem}_leftImg8bit.png"
    found = None
    for kind in ("labelTrainIds", "labelIds"):
        if next((root / fine).glob(f"*/*/*_{kind}.png"), None) is None:
            continue
        found = match_patterns(root, images, f"{fine}/{{split}}/{{stem}}_{fine}_{kind}.png")
        layout = f"Cityscapes: leftImg8bit/ + {fine}/ with _{fine}_{kind}"
        found = replace(found, layout=layout)
        if {entry.key for entry in found.images} <= {entry.key for entry in found.masks}:
            break
    return found


def refuse_parent_folder(root: Path) -> None:
    """Raise a DataError if a data set of these layouts lies in a subfolder of `root`."""
    for name in ("JPEGImages", "leftImg8bit"):
        for path in (*root.glob(f"*/{name}"), *root.glob(f"*/*/{name}")):
            if (path.parent / "SegmentationClass").is_dir() or (path.parent / "gtFine").is_dir():
                raise DataError(
                    f"{root}: the data is in the subfolder {path.parent}; pass that folder as DATA."
                )
