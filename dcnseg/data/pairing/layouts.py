"""How the images and masks of a data folder are laid out; the entry point is `recognize`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Final

from dcnseg.data.pairing.coco import find_coco, read_coco_files
from dcnseg.data.pairing.folder_names import PlacedFile, place_files
from dcnseg.data.pairing.listing import find_files, find_images, find_unsupported, is_data_folder
from dcnseg.data.pairing.name_rules import NameRule, RuleChoice, find_name_rules
from dcnseg.data.pairing.one_folder import part_one_folder
from dcnseg.data.pairing.patterns import match_patterns
from dcnseg.data.pairing.splits import Entry, Found
from dcnseg.data.pairing.voc import find_voc
from dcnseg.data.polygons.labelme import is_labelme
from dcnseg.errors import DataError

_GENERAL_ADVICE: Final = (
    "An image and its mask must have the same name apart from the ending and a common prefix or "
    "suffix."
)


_DEFAULT: Final = "images/{stem}.jpg"


@dataclass(frozen=True)
class _Reading:
    """One way to understand the folders: which are images, which masks, and the names' rules."""

    images: Sequence[PlacedFile]
    masks: Sequence[PlacedFile]
    choice: RuleChoice

    def templates(self, rule: NameRule) -> tuple[str, str]:
        """The patterns that say this reading."""
        return (
            _with_affixes(_common_template(self.images), rule.image_prefix, rule.image_suffix),
            _with_affixes(_common_template(self.masks), rule.mask_prefix, rule.mask_suffix),
        )


def recognize(root: Path) -> Found:
    """Find the images and masks of a data folder by the names of folders and files.

    In this order: PASCAL VOC, Cityscapes, folders named for images and for masks (in split folders,
    above them, or without), a COCO file, one folder with suffixes, LabelMe files.

    Raises:
        DataError: There are no images, or the names can be read in two ways; names both.
    """
    special = find_voc(root) or _find_cityscapes(root)
    if special:
        return special
    image_files = place_files(root, find_images(root))
    if not image_files:
        raise DataError(
            f"{root}: holds no images; their names end in .png, .jpg, .tif or so.{_skipped(root)} "
            "Expected the folders images and masks, or train, val and test folders that hold "
            "these; any other layout is told by --images and --masks."
        )
    _refuse_wrapped(root)
    json_files = place_files(root, find_files(root, {".json"}))
    reading = _best_reading(root, _readings(image_files)) or _nested_reading(root, image_files)
    if reading and (reading.choice.pairs or not json_files):
        return _found(reading, image_files)
    coco_files, problems = read_coco_files([file.entry.path for file in json_files])
    if coco_files:
        return replace(find_coco(root, image_files, coco_files), problems=tuple(problems))
    alone = _one_folder(root, image_files) if reading is None else None
    if alone and (alone.pairs_up or not json_files):
        return alone.found
    labelme = _find_labelme(image_files, json_files)
    if labelme:
        return labelme
    if reading:
        found = _found(reading, image_files)
    else:
        found = alone.found if alone else _without_masks(image_files)
    return replace(found, problems=tuple(problems))


def _skipped(root: Path) -> str:
    """Say what there is instead of images."""
    unread = find_unsupported(root)
    if not unread:
        return ""
    path, reason = next(iter(unread.items()))
    more = f", and {len(unread) - 1} more" if len(unread) > 1 else ""
    return f" Skipped: {path.relative_to(root)} ({reason}){more}."


def _find_cityscapes(root: Path) -> Found | None:
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


def _refuse_wrapped(root: Path) -> None:
    """A layout that is found by its folders' names must not be read in half from above."""
    for name in ("JPEGImages", "leftImg8bit"):
        for path in (*root.glob(f"*/{name}"), *root.glob(f"*/*/{name}")):
            if (path.parent / "SegmentationClass").is_dir() or (path.parent / "gtFine").is_dir():
                raise DataError(
                    f"{root}: the data lies deeper, in {path.parent}; give that folder as DATA."
                )


def _readings(image_files: Sequence[PlacedFile]) -> list[_Reading]:
    """Return each way to combine a folder of images with one of masks."""
    by_role: dict[str, list[PlacedFile]] = defaultdict(list)
    for file in image_files:
        by_role[file.role].append(file)
    if not by_role["mask"]:
        return []
    images = by_role["image"] or by_role[""]
    return [
        _read(some_images, some_masks)
        for some_images in _by_source(images)
        for some_masks in _by_source(by_role["mask"])
    ]


def _nested_reading(root: Path, image_files: Sequence[PlacedFile]) -> _Reading | None:
    """Take folders of masks within those of images, if these hold any masks."""
    paths = [file.entry.path for file in image_files]
    reading = _best_reading(root, _readings(place_files(root, paths, last_role=True)))
    return reading if reading and reading.choice.pairs else None


def _read(images: Sequence[PlacedFile], masks: Sequence[PlacedFile]) -> _Reading:
    choice = _rules(images, masks)
    if not choice.pairs:  # "annotations/trimaps/a.png" beside "images/a.jpg"
        less_images, less_masks = _without_common_folder(images), _without_common_folder(masks)
        other = _rules(less_images, less_masks)
        if other.pairs:
            return _Reading(less_images, less_masks, other)
    return _Reading(images, masks, choice)


def _rules(images: Sequence[PlacedFile], masks: Sequence[PlacedFile]) -> RuleChoice:
    return find_name_rules([file.entry.key for file in images], [file.entry.key for file in masks])


def _without_common_folder(files: Sequence[PlacedFile]) -> list[PlacedFile]:
    """Leave out the folders that the stems of all files begin with."""
    folders = [file.entry.stem.split("/")[:-1] for file in files]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    common = "".join(f"{names[0]}/" for names in shared)
    return [
        replace(
            file,
            entry=replace(file.entry, stem=file.entry.stem.removeprefix(common)),
            template=file.template
            if "*" in file.template  # which then stands for that folder
            else file.template.replace("{stem}", f"{common}{{stem}}"),
        )
        for file in files
    ]


def _by_source(files: Sequence[PlacedFile]) -> list[list[PlacedFile]]:
    """Group files by the folder that gave the role; "masks" goes before "masks_color"."""
    groups: dict[str, list[PlacedFile]] = defaultdict(list)
    for file in files:
        groups[file.source].append(file)
    plain = [group for group in groups.values() if not group[0].variant]
    kept = plain or list(groups.values())
    splits = [{file.entry.split for file in group} for group in kept]
    if sum(map(len, splits)) == len(set[str]().union(*splits)):
        return [[file for group in kept for file in group]]  # "train/images" and "val/imgs"
    return kept


def _best_reading(root: Path, readings: Sequence[_Reading]) -> _Reading | None:
    possible = [reading for reading in readings if reading.choice.pairs]
    ways = [(reading, rule) for reading in possible for rule in reading.choice.rules]
    if len(ways) > 1:
        told = [_described(reading, rule) for reading, rule in ways[:2]]
        raise DataError(
            f"{root}: can be read in {'two' if len(ways) == 2 else len(ways)} ways, as {told[0]} "
            f"or as {told[1]}. Say which by these options, or move the other files away."
        )
    return next(iter(possible or readings), None)


def _described(reading: _Reading, rule: NameRule) -> str:
    images, masks = reading.templates(rule)
    return f"{reading.choice.pairs} pairs of --images '{images}' --masks '{masks}'"


def _found(reading: _Reading, image_files: Sequence[PlacedFile]) -> Found:
    rule = reading.choice.rules[0]
    images, masks = reading.templates(rule)
    is_left_out = reading.choice.is_beside
    kept = [
        file.entry
        for file in reading.masks
        if rule.mask_key(file.entry.key) or not is_left_out(file.entry.key)
    ]
    what = f"{_folder(images)} + {_folder(masks)} {rule.describe()}"
    elsewhere = len(image_files) - len(reading.images) - len(reading.masks)
    if elsewhere:
        what += f"; {elsewhere} other images are passed over"
    return Found(
        images=[_renamed(file.entry, rule.image_key(file.entry.key)) for file in reading.images],
        masks=[_renamed(entry, rule.mask_key(entry.key)) for entry in kept],
        layout=what,
        advice=f"{_GENERAL_ADVICE} If they are somewhere else, say where, as in --images "
        f"'{images}' --masks '{masks}'.",
    )


def _renamed(entry: Entry, key: tuple[str, str] | None) -> Entry:
    # What the rule does not fit keeps its whole name. The mark keeps it from meeting another's
    # shortened one: with the suffix _L the mask "b" is not that of the image "b".
    return replace(entry, stem=key[1] if key else f"{entry.stem}\0")


def _common_template(files: Sequence[PlacedFile]) -> str:
    counts = Counter(file.template for file in files)
    # The least of the most common, so that the order of the files does not matter.
    return min(counts, key=lambda text: (-counts[text], text), default=_DEFAULT)


def _with_affixes(template: str, prefix: str, suffix: str) -> str:
    return template.replace("{stem}", f"{prefix}{{stem}}{suffix}")


def _folder(template: str) -> str:
    folder = template.rpartition("/")[0]
    return f"{folder}/" if folder else "./"


@dataclass(frozen=True)
class _OneFolder:
    found: Found
    pairs_up: bool


def _one_folder(root: Path, image_files: Sequence[PlacedFile]) -> _OneFolder | None:
    """Tell masks from images by their names, where no folder does."""
    parted = part_one_folder([file.entry for file in image_files])
    if not parted:
        return None
    is_image = {entry.path for entry in parted.images}
    is_mask = {entry.path for entry in parted.masks}
    reading = _Reading(
        [file for file in image_files if file.entry.path in is_image],
        [file for file in image_files if file.entry.path in is_mask],
        RuleChoice((parted.rules[0],), parted.pairs),
    )
    if len(parted.rules) > 1:
        raise DataError(
            f"{root}: can be read in two ways, {parted.rules[0].describe()} or "
            f"{parted.rules[1].describe()}. Say which: {_described(reading, parted.rules[0])}."
        )
    found = _found(reading, image_files)
    kind = parted.rules[0].describe() if parted.rules[0].length else "by name, .jpg + .png"
    layout = found.layout.replace(found.layout.partition(";")[0], f"one folder, {kind}", 1)
    return _OneFolder(replace(found, layout=layout), parted.pairs > 0)


def _find_labelme(
    image_files: Sequence[PlacedFile], json_files: Sequence[PlacedFile]
) -> Found | None:
    """Pair images with JSON files of the same stem, beside them or in a folder of masks."""
    images = [file.entry for file in image_files if file.role != "mask"]
    keys = {entry.key for entry in images}
    masks = [f.entry for f in json_files if f.entry.key in keys or is_labelme(f.entry.path)]
    if not keys & {entry.key for entry in masks}:
        return None
    advice = "Each image needs a LabelMe file of the same name apart from the ending."
    return Found(images, masks, "LabelMe JSON by name", advice)


def _without_masks(image_files: Sequence[PlacedFile]) -> Found:
    template = _common_template(image_files)
    return Found(
        [file.entry for file in image_files],
        [],
        "no masks found",
        "There is no folder named masks, labels, annotations, gt or so, and no file named with a "
        f"suffix such as _mask. Say where they are, as in --images '{template}' "
        f"--masks '{_folder(template) if '/' in template else ''}{{stem}}_mask.png'.",
    )
