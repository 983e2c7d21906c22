"""Pairs images with the COCO files that list them; the entry point is `find_coco`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from dcnseg.data.pairing.folder_names import PlacedFile, place_files
from dcnseg.data.pairing.splits import SPLIT_WORDS, Entry, Found
from dcnseg.data.polygons.coco_file import CocoFile, CocoImage, is_name_of, read_coco
from dcnseg.data.sample import FileProblem, to_nfc
from dcnseg.errors import DataError

_NAMES: Final = re.compile(r"instances.*|_?annotations?|.*coco.*|train|val|valid|test", re.I)


def read_coco_files(json_files: Sequence[Path]) -> tuple[list[CocoFile], list[FileProblem]]:
    """Read the files with the usual names of COCO files; return them and their problems."""
    files: list[CocoFile] = []
    problems: list[FileProblem] = []
    for path in json_files:
        if not _NAMES.fullmatch(path.stem.removesuffix(".coco")):
            continue
        try:
            content = read_coco(path)
        except DataError as error:
            problems.append(FileProblem(path, str(error).removeprefix(f"{path}: ")))
            continue
        if isinstance(content, CocoFile):
            files.append(content)
            problems += [FileProblem(path, what) for what in content.problems]
    return files, problems


def find_coco(root: Path, image_files: Sequence[PlacedFile], files: Sequence[CocoFile]) -> Found:
    """Pair images with the COCO files that list them.

    The split comes from the file's folder or name ("instances_val2017.json"), else from the image's
    folder. Images in a split without a COCO file are ignored.

    Raises:
        DataError: A name in a file matches several images.
    """
    by_name: dict[str, list[PlacedFile]] = defaultdict(list)
    for file in image_files:
        by_name[to_nfc(file.entry.path.name)].append(file)
    images: list[Entry] = []
    masks: list[Entry] = []
    for coco in files:
        split = _split_of(root, coco.path)
        for listed in (file for group in coco.coco_images.values() for file in group):
            found = _image_of(listed, split, by_name, coco.path)
            if found is None:
                masks.append(Entry(coco.path / listed.file_name, split, f"{listed.file_name}\0"))
                continue
            entry = Entry(found.entry.path, split or found.entry.split, found.entry.stem)
            images.append(entry)
            masks.append(Entry(coco.path, entry.split, entry.stem))
    shown = ", ".join(coco.path.relative_to(root).as_posix() for coco in files[:3])
    rest, num_ignored = _unlisted(image_files, images)
    ignored = f"; {num_ignored} images in a split without a COCO file are ignored"
    return Found(
        [*images, *rest],
        masks,
        f"COCO JSON {shown}{ignored if num_ignored else ''}",
        "A COCO file must list each image by its file_name.",
    )


def _unlisted(
    image_files: Sequence[PlacedFile], images: Sequence[Entry]
) -> tuple[list[Entry], int]:
    """Return the images that no file lists, and the number of those in splits without a file."""
    known = {entry.path for entry in images}
    splits = {entry.split for entry in images}
    rest = [
        file.entry for file in image_files if file.entry.path not in known and file.role != "mask"
    ]
    missed = [entry for entry in rest if not entry.split or entry.split in splits]
    return missed, len(rest) - len(missed)


def _split_of(root: Path, path: Path) -> str:
    in_folder = place_files(root, [path])[0].entry.split
    words = [word.rstrip("0123456789") for word in re.split(r"[_\-. ]+", path.stem.lower())]
    return in_folder or next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _image_of(
    listed: CocoImage, split: str, by_name: Mapping[str, Sequence[PlacedFile]], path: Path
) -> PlacedFile | None:
    found = list(by_name.get(PurePosixPath(to_nfc(listed.file_name)).name, ()))
    for preferred in (
        [file for file in found if is_name_of(listed.file_name, file.entry.path)],
        [file for file in found if split and file.entry.split == split],
        [file for file in found if file.entry.path.is_relative_to(path.parent)],
    ):
        if len(found) > 1 and preferred:
            found = [file for file in found if file in preferred] or found
    if len(found) > 1:
        first, second = (file.entry.path for file in found[:2])
        raise DataError(f"{path}: the name {listed.file_name} matches {first} and {second}.")
    return found[0] if found else None
