"""COCO files, one for many pictures; entry points `find_coco` and `read_coco`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.pairing.folder_names import PlacedFile, place_files
from dcnseg.data.pairing.listing import composed
from dcnseg.data.pairing.samples import SPLIT_WORDS, Entry, Found
from dcnseg.data.polygons.rasters import decode_runs
from dcnseg.data.polygons.shapes import Annotation, Shape, read_json, read_ring, read_size_hw
from dcnseg.errors import DataError

_NAMES: Final = re.compile(r"instances.*|_?annotations?|.*coco.*|train|val|valid|test", re.I)


@dataclass(frozen=True)
class CocoPicture:
    """A picture of a COCO file; its annotations are read when they are asked for."""

    file_name: str
    size_hw: tuple[int, int]
    annotations: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CocoFile:
    """A COCO file: its pictures by the last part of their name, and its classes in their order."""

    path: Path
    pictures: Mapping[str, Sequence[CocoPicture]]
    names: Mapping[int, str]

    def annotation_of(self, image: Path) -> Annotation:
        """Return the shapes of a picture.

        Raises:
            DataError: The file does not list it, or an annotation is damaged or has no area.
        """
        listed = self.pictures.get(composed(image.name), ())
        fitting = [picture for picture in listed if _is_name_of(picture.file_name, image)]
        if len(fitting) != 1 and len(listed) != 1:
            raise DataError(f"{self.path}: lists {image.name} {len(listed)} times; expected once.")
        picture = (fitting or listed)[0]
        shapes = tuple(self._shape(entry, picture) for entry in picture.annotations)
        return Annotation(picture.size_hw, shapes)

    def _shape(self, entry: Mapping[str, Any], picture: CocoPicture) -> Shape:
        what = f"{self.path}: the annotation {entry.get('id')} of {picture.file_name}"
        name = self.names.get(entry.get("category_id", -1))
        if name is None:
            raise DataError(f"{what} has the category {entry.get('category_id')!r}, not listed.")
        outline = entry.get("segmentation")
        if isinstance(outline, dict):
            return Shape(name, (), _decode(outline, picture.size_hw, what))
        if not isinstance(outline, list) or not outline:
            raise DataError(f"{what} has no segmentation, as a mere box has none; take it out.")
        return Shape(name, tuple(_ring(flat, what) for flat in outline))


def find_coco(
    root: Path, pictures: Sequence[PlacedFile], json_files: Sequence[Path]
) -> Found | None:
    """Pair pictures with the COCO files that list them, if there are such files.

    The split is in the file's folder or name ("instances_val2017.json"), else in the picture's
    folder. Pictures in a split of which no file tells are passed over.

    Raises:
        DataError: A file is damaged, or a name that it lists fits several pictures.
    """
    named = [path for path in json_files if _NAMES.fullmatch(path.stem.removesuffix(".coco"))]
    files = [coco for coco in map(read_coco, named) if isinstance(coco, CocoFile)]
    if not files:
        return None
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
        [file for file in found if _is_name_of(listed.file_name, file.entry.path)],
        [file for file in found if split and file.entry.split == split],
        [file for file in found if file.entry.path.is_relative_to(path.parent)],
    ):
        if len(found) > 1 and narrower:
            found = [file for file in found if file in narrower] or found
    if len(found) > 1:
        first, second = (file.entry.path for file in found[:2])
        raise DataError(f"{path}: the picture {listed.file_name} may be {first} or {second}.")
    return found[0] if found else None


def _is_name_of(file_name: str, path: Path) -> bool:
    parts = PurePosixPath(composed(file_name)).parts
    return tuple(map(composed, path.parts))[-len(parts) :] == parts


class _OtherJsonError(Exception):
    """A JSON file is not in COCO's form; an exception, because a cache does not keep these."""

    def __init__(self, content: Any) -> None:
        super().__init__()
        self.content = content


def read_coco(path: Path) -> CocoFile | Any:
    """Read a COCO file, or return what a JSON file of another form holds.

    A COCO file is read once as long as it does not change.

    Raises:
        DataError: The file cannot be read, or an entry is damaged.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        return _read_coco(path, status.st_mtime_ns, status.st_size)
    except _OtherJsonError as other:
        return other.content


@lru_cache(maxsize=8)
def _read_coco(path: Path, mtime_ns: int, num_bytes: int) -> CocoFile:
    content = read_json(path)
    names = ("images", "annotations", "categories")
    if isinstance(content, dict) and all(isinstance(content.get(name), list) for name in names):
        return parse_coco(content, path)
    raise _OtherJsonError(content)


def parse_coco(content: Mapping[str, Any], path: Path) -> CocoFile:
    """Sort the annotations of a COCO file by picture.

    Raises:
        DataError: An entry is damaged, or two classes have one name.
    """
    try:
        by_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
        for entry in content["annotations"]:
            by_image[entry["image_id"]].append(entry)
        pictures: dict[str, list[CocoPicture]] = defaultdict(list)
        for image in content["images"]:
            name = str(image["file_name"]).replace("\\", "/")
            size_hw = read_size_hw(image["height"], image["width"], f"{path}: the picture {name}")
            picture = CocoPicture(name, size_hw, by_image[image["id"]])
            pictures[PurePosixPath(composed(name)).name].append(picture)
        names = _category_names(content)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: an entry is incomplete ({error!r}).") from error
    return CocoFile(path, pictures, names)


def _category_names(content: Mapping[str, Any]) -> dict[int, str]:
    """Return the names by id, in its order, without unused heads of groups of classes."""
    heads = {entry.get("supercategory") for entry in content["categories"]}
    used = {entry["category_id"] for entry in content["annotations"]}
    named = {int(entry["id"]): str(entry["name"]).strip() for entry in content["categories"]}
    return {i: named[i] for i in sorted(named) if i in used or named[i] not in heads}


def _ring(flat: Any, what: str) -> npt.NDArray[np.float64]:
    if not isinstance(flat, list) or len(flat) % 2:
        raise DataError(f"{what} has an outline that is no list of x, y, x, y, ...")
    return read_ring([flat[i : i + 2] for i in range(0, len(flat), 2)], what)


def _decode(runs: Mapping[str, Any], size_hw: tuple[int, int], what: str) -> npt.NDArray[np.bool_]:
    size, counts = runs.get("size"), runs.get("counts")
    if size != list(size_hw):
        raise DataError(f"{what} has run lengths for the size {size}, not {list(size_hw)}.")
    if not isinstance(counts, str | list):
        raise DataError(f"{what} has no run lengths.")
    try:
        return decode_runs(size_hw, counts)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{what}: {error}.") from error
