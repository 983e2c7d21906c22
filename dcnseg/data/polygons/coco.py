"""The pictures that COCO files list, one file for many; the entry point is `find_coco`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from dcnseg.data.pairing.folder_names import PlacedFile, place_files
from dcnseg.data.pairing.listing import composed
from dcnseg.data.pairing.samples import SPLIT_WORDS, Entry, FileProblem, Found
from dcnseg.data.polygons.coco_file import CocoFile, CocoPicture, is_name_of, read_coco
from dcnseg.errors import DataError

_NAMES: Final = re.compile(r"instances.*|_?annotations?|.*coco.*|train|val|valid|test", re.I)


def read_coco_files(json_files: Sequence[Path]) -> tuple[list[CocoFile], list[FileProblem]]:
    """Read the files that are named as COCO files are; say what is wrong with them."""
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


def find_coco(root: Path, pictures: Sequence[PlacedFile], files: Sequence[CocoFile]) -> Found:
    """Pair pictures with the COCO files that list them.

    The split is in the file's folder or name ("instances_val2017.json"), else in the picture's
    folder. Pictures in a split of which no file tells are passed over.

    Raises:
        DataError: A name that a file lists fits several pictures.
    """
    by_name: dict[str, list[PlacedFile]] = defaultdict(list)
    for picture in pictures:
        by_name[composed(picture.entry.path.name)].append(picture)
    images: list[Entry] = []
    masks: list[Entry] = []
    for coco in files:
        split = _split_of(root, coco.path)
        for listed in (picture for group in coco.pictures.values() for picture in group):
            file = _picture_of(listed, split, by_name, coco.path)
            if file is None:
                masks.append(Entry(coco.path / listed.file_name, split, f"{listed.file_name}\0"))
                continue
            entry = Entry(file.entry.path, split or file.entry.split, file.entry.stem)
            images.append(entry)
            masks.append(Entry(coco.path, entry.split, entry.stem))
    shown = ", ".join(coco.path.relative_to(root).as_posix() for coco in files[:3])
    rest, left_out = _unlisted(pictures, images)
    passed = f"; {left_out} pictures in a split without such a file are passed over"
    return Found(
        [*images, *rest],
        masks,
        f"COCO JSON {shown}{passed if left_out else ''}",
        "A COCO file must list each picture by its file_name.",
    )


def _unlisted(pictures: Sequence[PlacedFile], images: Sequence[Entry]) -> tuple[list[Entry], int]:
    """Return the pictures that no file lists, and the number of those that none would."""
    known = {entry.path for entry in images}
    splits = {entry.split for entry in images}
    rest = [file.entry for file in pictures if file.entry.path not in known and file.role != "mask"]
    missed = [entry for entry in rest if not entry.split or entry.split in splits]
    return missed, len(rest) - len(missed)


def _split_of(root: Path, path: Path) -> str:
    in_folder = place_files(root, [path])[0].entry.split
    words = [word.rstrip("0123456789") for word in re.split(r"[_\-. ]+", path.stem.lower())]
    return in_folder or next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _picture_of(
    listed: CocoPicture, split: str, by_name: Mapping[str, Sequence[PlacedFile]], path: Path
) -> PlacedFile | None:
    found = list(by_name.get(PurePosixPath(composed(listed.file_name)).name, ()))
    for narrower in (
        [file for file in found if is_name_of(listed.file_name, file.entry.path)],
        [file for file in found if split and file.entry.split == split],
        [file for file in found if file.entry.path.is_relative_to(path.parent)],
    ):
        if len(found) > 1 and narrower:
            found = [file for file in found if file in narrower] or found
    if len(found) > 1:
        first, second = (file.entry.path for file in found[:2])
        raise DataError(f"{path}: the picture {listed.file_name} may be {first} or {second}.")
    return found[0] if found else None
