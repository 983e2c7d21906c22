"""Reads COCO files and collects their problems; the entry point is `read_coco`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_info import is_class_name
from dcnseg.data.polygons.rasters import decode_runs
from dcnseg.data.polygons.shapes import (
    Annotation,
    Shape,
    read_json,
    read_ring,
    read_shapes,
    read_size_hw,
)
from dcnseg.data.sample import to_nfc
from dcnseg.errors import DataError, short_repr
from dcnseg.files import explain_unreadable

_LISTS: Final = ("images", "annotations", "categories")
_SHOWN: Final = 5

Key = int | str
Problems = dict[str, list[str]]  # invalid entries by problem
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class CocoImage:
    """An image of a COCO file; its annotations are parsed on request."""

    file_name: str
    size_hw: tuple[int, int]
    annotations: Sequence[Entry]


@dataclass(frozen=True)
class CocoFile:
    """A COCO file: its images by file name without folders, and its classes in order.

    `problems` names the entries that were skipped and the reasons, one sentence each.
    """

    path: Path
    coco_images: Mapping[str, Sequence[CocoImage]]
    names: Mapping[int, str]
    problems: tuple[str, ...] = ()

    def annotation_of(self, image: Path) -> Annotation:
        """Return the shapes of an image.

        Raises:
            DataError: The file does not list it, or an annotation is damaged or has no area.
        """
        listed = self.coco_images.get(to_nfc(image.name), ())
        fitting = [coco_image for coco_image in listed if is_name_of(coco_image.file_name, image)]
        if len(fitting) != 1 and len(listed) != 1:
            reason = f" {self.problems[0]}" if self.problems and not listed else ""
            raise DataError(
                f"{self.path}: lists {image.name} {len(listed)} times; expected once.{reason}"
            )
        coco_image = (fitting or listed)[0]
        shapes = read_shapes(coco_image.annotations, lambda entry: self._shape(entry, coco_image))
        return Annotation(coco_image.size_hw, shapes)

    def _shape(self, entry: Entry, coco_image: CocoImage) -> Shape:
        number = short_repr(entry.get("id"))
        what = f"{self.path}: the annotation {number} of {coco_image.file_name}"
        category = entry.get("category_id")
        name = self.names.get(_whole(category, -1))
        if name is None:
            raise DataError(
                f"{what} has the category {short_repr(category)}, which the file does "
                "not list. Add the category, or remove the annotation."
            )
        outline = entry.get("segmentation")
        if isinstance(outline, dict):
            return Shape(name, (), _decode(outline, coco_image.size_hw, what))
        if not isinstance(outline, list) or not outline:
            raise DataError(f"{what} has no segmentation. Add polygons, or remove the annotation.")
        return Shape(name, tuple(_ring(flat, what) for flat in outline))


def is_name_of(file_name: str, path: Path) -> bool:
    """Whether a path ends with a `file_name` of a COCO file."""
    parts = PurePosixPath(to_nfc(file_name)).parts
    return tuple(map(to_nfc, path.parts))[-len(parts) :] == parts


class _OtherJsonError(Exception):
    """A JSON file does not have the form of COCO; raised because exceptions are not cached."""

    def __init__(self, content: Any) -> None:
        super().__init__()
        self.content = content


def read_coco(path: Path) -> CocoFile | Any:
    """Read a COCO file, or return the content of a JSON file of another form.

    An unchanged COCO file is read only once.

    Raises:
        DataError: The file cannot be read.
    """
    with explain_unreadable(path, "a readable path"):
        status = path.stat()
    try:
        return _read_coco(path, status.st_mtime_ns, status.st_size)
    except _OtherJsonError as other:
        return other.content


@lru_cache(maxsize=8)
def _read_coco(path: Path, mtime_ns: int, num_bytes: int) -> CocoFile:
    content = read_json(path)
    if isinstance(content, dict) and all(isinstance(content.get(name), list) for name in _LISTS):
        return parse_coco(content, path)
    raise _OtherJsonError(content)


def _sentence(what: str, entries: Sequence[str]) -> str:
    rest = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{', '.join(entries[:_SHOWN])}{rest}: {what}"


def parse_coco(content: Mapping[str, Sequence[Any]], path: Path) -> CocoFile:
    """Group the annotations of a COCO file by image; invalid entries become problems."""
    problems: Problems = defaultdict(list)
    images = _images_by_id(content["images"], problems)
    by_image: dict[Key, list[Entry]] = {key: [] for key in images}
    for index, entry in enumerate(content["annotations"]):
        key = _key(entry.get("image_id")) if isinstance(entry, dict) else None
        if key is None:
            problems["an annotation needs an `image_id`."].append(f"annotations[{index}]")
        elif key not in by_image:
            name = f"annotation {short_repr(entry.get('id'))} of image {short_repr(key)}"
            what = "the file does not list this image. Add it, or remove the annotation."
            problems[what].append(name)
        else:
            by_image[key].append(entry)
    coco_images: dict[str, list[CocoImage]] = defaultdict(list)
    for key, (name, entry) in images.items():
        try:
            size_hw = read_size_hw(entry.get("height"), entry.get("width"), "")
        except DataError as error:
            problems[f"it{error}"].append(f"image {name}")
            continue
        coco_image = CocoImage(name, size_hw, by_image[key])
        coco_images[PurePosixPath(to_nfc(name)).name].append(coco_image)
    names = _category_names(content["categories"], by_image, problems)
    sentences = tuple(_sentence(what, entries) for what, entries in problems.items())
    return CocoFile(path, coco_images, names, sentences)


def _images_by_id(entries: Sequence[Any], problems: Problems) -> dict[Key, tuple[str, Entry]]:
    images: dict[Key, tuple[str, Entry]] = {}
    for index, entry in enumerate(entries):
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("file_name") if key is not None else None
        if key is None or not isinstance(name, str) or not name.strip():
            problems["an image needs an `id` and a `file_name`."].append(f"images[{index}]")
        elif key in images:
            both = f"{images[key][0]} and {name}"
            problems[f"two images have the id {short_repr(key)}."].append(both)
        else:
            images[key] = name.replace("\\", "/"), entry
    return images


def _category_names(
    entries: Sequence[Any], by_image: Mapping[Key, Sequence[Entry]], problems: Problems
) -> dict[int, str]:
    """Return the names in the order of their ids, without unused supercategories."""
    named: dict[int, str] = {}
    heads: set[str] = set()
    for index, entry in enumerate(entries):
        number = _whole(entry.get("id")) if isinstance(entry, dict) else None
        if number is None or not is_class_name(entry.get("name")):
            what = "a category needs an integer `id` and a `name` on one line."
            problems[what].append(f"categories[{index}]")
            continue
        name = entry["name"].strip()
        if named.setdefault(number, name) != name:
            what = (
                f"two categories have the id {short_repr(number)}. Give each category a unique id."
            )
            problems[what].append(f"{short_repr(named[number])} and {short_repr(name)}")
        heads |= {head for head in [entry.get("supercategory")] if isinstance(head, str)}
    used = {_whole(e.get("category_id")) for group in by_image.values() for e in group}
    return {i: named[i] for i in sorted(named) if i in used or named[i] not in heads}


def _key(value: Any) -> Key | None:
    """Return the id of an image, an integer or a string; None if it is neither."""
    return value if type(value) is str else _whole(value)


def _whole(value: Any, default: int | None = None) -> Any:
    """Return an integer that may be written 3, 3.0 or "3", else the default."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is str and value.isdecimal() and len(value) < 19:
        return int(value)
    return default


def _ring(flat: Any, what: str) -> npt.NDArray[np.float64]:
    if not isinstance(flat, list) or len(flat) % 2:
        raise DataError(f"{what} has an outline that is not a list of coordinates x, y, x, y, ...")
    return read_ring([flat[i : i + 2] for i in range(0, len(flat), 2)], what)


def _decode(runs: Entry, size_hw: tuple[int, int], what: str) -> npt.NDArray[np.bool_]:
    size, counts = runs.get("size"), runs.get("counts")
    if size != list(size_hw):
        raise DataError(
            f"{what} has run lengths for the size {short_repr(size)}, not {list(size_hw)}."
        )
    if not isinstance(counts, str | list):
        raise DataError(f"{what} has no run lengths.")
    try:
        return decode_runs(size_hw, counts)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{what}: {error}.") from error
