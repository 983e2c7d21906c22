"""Folders named for images and for masks -> pairs; the entry point is `read_folders`.

A `Reading` is one way to tell the images of a data folder from the masks and to pair them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Final

from dcnseg.data.pairing.folder_names import PlacedFile, place_files
from dcnseg.data.pairing.name_rules import NameRule, RuleChoice, find_name_rules
from dcnseg.data.pairing.splits import Entry, Found
from dcnseg.errors import DataError

_DEFAULT: Final = "images/{stem}.jpg"


@dataclass(frozen=True)
class Reading:
    """Which files are images and which are masks, and the rules that pair their names.

    `layout` describes the reading; empty: its folders and rule do.
    """

    images: Sequence[PlacedFile]
    masks: Sequence[PlacedFile]
    choice: RuleChoice
    layout: str = ""

    def templates(self, rule: NameRule) -> tuple[str, str]:
        """Return the patterns for --images and --masks that express this reading."""
        return (
            _with_affixes(common_template(self.images), rule.image_prefix, rule.image_suffix),
            _with_affixes(common_template(self.masks), rule.mask_prefix, rule.mask_suffix),
        )

    def to_found(self, num_files: int) -> Found:
        """Return the images and masks; `num_files` is the number of all image files."""
        rule = self.choice.rules[0]
        images, masks = self.templates(rule)
        layout = self.layout or f"{folder_of(images)} + {folder_of(masks)} {rule.describe()}"
        num_others = num_files - len(self.images) - len(self.masks)
        if num_others:
            layout += f"; {num_others} other images are ignored"
        return Found(
            [_renamed(file.entry, rule.image_key(file.entry.key)) for file in self.images],
            [
                _renamed(file.entry, rule.mask_key(file.entry.key))
                for file in self.masks
                if rule.mask_key(file.entry.key) or not self.choice.is_beside(file.entry.key)
            ],
            layout,
            "An image and its mask must have the same name except for the extension and a common "
            f"prefix or suffix. For other folders, pass patterns such as --images '{images}' "
            f"--masks '{masks}'.",
        )


def read_folders(root: Path, files: Sequence[PlacedFile]) -> Reading | None:
    """Find folders named for images and for masks, either side by side or nested.

    Raises:
        DataError: The names can be read in more than one way; names two of them.
    """
    reading = choose_reading(root, _readings(files))
    if reading:
        return reading
    # "images/masks/a.png" is a mask if that pairs up.
    nested = place_files(root, [file.entry.path for file in files], last_role=True)
    reading = choose_reading(root, _readings(nested))
    return reading if reading and reading.choice.pairs else None


def choose_reading(root: Path, readings: Sequence[Reading]) -> Reading | None:
    """Return the one reading that pairs files, else the first, if any.

    Raises:
        DataError: More than one pairs files; gives the options of two.
    """
    possible = [reading for reading in readings if reading.choice.pairs]
    options = [_options(reading, rule) for reading in possible for rule in reading.choice.rules]
    if len(options) > 1:
        raise DataError(
            f"{root}: can be read in {'two' if len(options) == 2 else len(options)} ways, as "
            f"{options[0]} or as {options[1]}. Pass the options of one of them, or move the other "
            "files to another folder."
        )
    return next(iter(possible or readings), None)


def _options(reading: Reading, rule: NameRule) -> str:
    images, masks = reading.templates(rule)
    return f"{reading.choice.pairs} pairs of --images '{images}' --masks '{masks}'"


def _readings(files: Sequence[PlacedFile]) -> list[Reading]:
    """Return each way to combine a folder of images with one of masks."""
    by_role: dict[str, list[PlacedFile]] = defaultdict(list)
    for file in files:
        by_role[file.role].append(file)
    if not by_role["mask"]:
        return []
    images = by_role["image"] or by_role[""]
    return [
        _read(some_images, some_masks)
        for some_images in _by_source(images)
        for some_masks in _by_source(by_role["mask"])
    ]


def _by_source(files: Sequence[PlacedFile]) -> list[list[PlacedFile]]:
    """Group files by the folder that gave the role; "masks" is preferred to "masks_color"."""
    groups: dict[str, list[PlacedFile]] = defaultdict(list)
    for file in files:
        groups[file.source].append(file)
    plain = [group for group in groups.values() if not group[0].variant]
    kept = plain or list(groups.values())
    splits = [{file.entry.split for file in group} for group in kept]
    if sum(map(len, splits)) == len(set[str]().union(*splits)):
        return [[file for group in kept for file in group]]  # "train/images" and "val/imgs"
    return kept


def _read(images: Sequence[PlacedFile], masks: Sequence[PlacedFile]) -> Reading:
    reading = Reading(images, masks, _rules(images, masks))
    if not reading.choice.pairs:  # "annotations/trimaps/a.png" with "images/a.jpg"
        images, masks = _without_common_folder(images), _without_common_folder(masks)
        other = Reading(images, masks, _rules(images, masks))
        return other if other.choice.pairs else reading
    return reading


def _rules(images: Sequence[PlacedFile], masks: Sequence[PlacedFile]) -> RuleChoice:
    return find_name_rules([file.entry.key for file in images], [file.entry.key for file in masks])


def _without_common_folder(files: Sequence[PlacedFile]) -> list[PlacedFile]:
    """Remove the folders with which all stems begin."""
    folders = [file.entry.stem.split("/")[:-1] for file in files]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    common = "".join(f"{names[0]}/" for names in shared)
    return [
        replace(
            file,
            entry=replace(file.entry, stem=file.entry.stem.removeprefix(common)),
            template=file.template
            if "*" in file.template  # * includes that folder
            else file.template.replace("{stem}", f"{common}{{stem}}"),
        )
        for file in files
    ]


def _renamed(entry: Entry, key: tuple[str, str] | None) -> Entry:
    # A name that the rule does not fit is kept whole and marked, so that it cannot equal a
    # shortened one: with the suffix _L, the mask "b" does not belong to the image "b".
    return replace(entry, stem=key[1] if key else f"{entry.stem}\0")


def common_template(files: Sequence[PlacedFile]) -> str:
    """Return the most common template of the files."""
    counts = Counter(file.template for file in files)
    # The least of the most common, so that the order of the files does not matter.
    return min(counts, key=lambda text: (-counts[text], text), default=_DEFAULT)


def _with_affixes(template: str, prefix: str, suffix: str) -> str:
    return template.replace("{stem}", f"{prefix}{{stem}}{suffix}")


def folder_of(template: str) -> str:
    """Return the folder of a template with a final slash, "./" for none."""
    folder = template.rpartition("/")[0]
    return f"{folder}/" if folder else "./"
