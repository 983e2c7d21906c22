"""Reads a list of pairs, CSV or text; the entry point is `read_pair_list`."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dcnseg.data.pairing.role_words import IMAGE_WORDS, MASK_WORDS
from dcnseg.data.pairing.splits import SPLIT_WORDS, Entry, Found
from dcnseg.data.sample import to_nfc
from dcnseg.errors import DataError, short_repr
from dcnseg.files import explain_unreadable, read_text

_IMAGE_HEADS: Final = IMAGE_WORDS | {"filename", "file", "image_path", "img_path", "image_file"}
_MASK_HEADS: Final = MASK_WORDS | {"mask_path", "label_path", "mask_file", "label_file"}
_SPLIT_HEADS: Final = frozenset({"split", "set", "subset", "fold", "phase"})
_SHOWN: Final = 3
_MAX_NAME: Final = 300  # characters of a path that are printed


@dataclass(frozen=True)
class _Line:
    number: int
    image: str
    mask: str
    split: str


def read_pair_list(root: Path, path: Path) -> Found:
    """Read a list with an image and its mask per line, and the split as an optional third column.

    Columns are separated by commas, semicolons, tabs or spaces; a name with such a character needs
    quotes. A header may give another order of the columns. Empty lines and lines that begin with #
    are ignored. Paths are relative to the list's folder, else to `root`.

    Raises:
        DataError: The list cannot be read, a line has fewer than two columns, a split is unknown, a
            file is missing, or an image is listed twice; gives the lines.
    """
    lines = _parse(path)
    if not lines:
        raise DataError(f"{path}: has no pairs; expected an image and its mask per line.")
    _check_splits(path, lines)
    images = [_locate(root, path, line.image) for line in lines]
    masks = [_locate(root, path, line.mask) for line in lines]
    _refuse_missing(path, lines, images, masks)
    stems = _stems(root, path, images)
    _refuse_repeated(path, lines, images)
    splits = [SPLIT_WORDS.get(line.split.lower(), "") for line in lines]
    return Found(
        [Entry(*values) for values in zip(images, splits, stems, strict=True)],
        [Entry(*values) for values in zip(masks, splits, stems, strict=True)],
        f"pairs of {path.name}",
    )


def _parse(path: Path) -> list[_Line]:
    with explain_unreadable(path, "a readable list of pairs"):
        text = read_text(path)
    numbered = [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    delimiter = _delimiter([line for _, line in numbered])
    rows = [(number, _columns(path, number, line, delimiter)) for number, line in numbered]
    order = _order(rows[0][1]) if rows else None
    if order:
        rows = rows[1:]
    return [_line(path, number, cells, order or (0, 1, 2)) for number, cells in rows]


def _delimiter(lines: Sequence[str]) -> str:
    """Return the first of tab, semicolon and comma that is in every line, else a space."""
    lines = [re.sub(r'"[^"]*"', "", line) for line in lines]
    return next((d for d in "\t;," if lines and all(d in line for line in lines)), " ")


def _columns(path: Path, number: int, line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        line = " ".join(line.split()) if '"' not in line else line
    try:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    except (csv.Error, StopIteration) as error:
        raise DataError(f"{path}: line {number} cannot be read ({error}).") from error
    return [cell.strip() for cell in cells]


def _order(cells: Sequence[str]) -> tuple[int, int, int] | None:
    """Return the columns of image, mask and split if these cells are a header, else None."""
    words = [cell.lower().replace(" ", "_") for cell in cells]
    image = next((i for i, word in enumerate(words) if word in _IMAGE_HEADS), -1)
    mask = next((i for i, word in enumerate(words) if word in _MASK_HEADS and i != image), -1)
    if image < 0 or mask < 0:
        return None
    split = next((i for i, word in enumerate(words) if word in _SPLIT_HEADS), len(words))
    return image, mask, split


def _line(path: Path, number: int, cells: Sequence[str], order: tuple[int, int, int]) -> _Line:
    image, mask, split = (cells[i] if i < len(cells) else "" for i in order)
    if not image or not mask:
        raise DataError(
            f"{path}: line {number} has {len([c for c in cells if c])} columns; expected an image, "
            'its mask and optionally the split. Put names with spaces or commas in "quotes".'
        )
    return _Line(number, image, mask, split)


def _check_splits(path: Path, lines: Sequence[_Line]) -> None:
    wrong = next((line for line in lines if line.split.lower() not in {*SPLIT_WORDS, ""}), None)
    if wrong:
        raise DataError(
            f"{path}: line {wrong.number} has the split {short_repr(wrong.split)}; expected "
            'train, val or test. Put names with spaces or commas in "quotes".'
        )
    without = next((line for line in lines if not line.split), None)
    if without and any(line.split for line in lines):
        raise DataError(
            f"{path}: line {without.number} has no split, but other lines have one. Add a split to "
            "every line."
        )


def _locate(root: Path, path: Path, name: str) -> Path:
    beside, below = path.parent / name, root / name
    return below if _is_file(below) and not _is_file(beside) else beside


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  (pathlib raises if a name is too long)


def _refuse_missing(
    path: Path, lines: Sequence[_Line], images: Sequence[Path], masks: Sequence[Path]
) -> None:
    missing = [
        f"line {line.number}: {str(file)[:_MAX_NAME]}"
        for line, pair in zip(lines, zip(images, masks, strict=True), strict=True)
        for file in pair
        if not _is_file(file)
    ]
    if missing:
        more = ", ..." if len(missing) > _SHOWN else ""
        raise DataError(
            f"{path}: {len(missing)} of the listed files are missing or are not regular files "
            f"({', '.join(missing[:_SHOWN])}{more}). Paths are relative to the folder of the list "
            "or to DATA."
        )


def _refuse_repeated(path: Path, lines: Sequence[_Line], images: Sequence[Path]) -> None:
    first: dict[Path, int] = {}
    for line, image in zip(lines, images, strict=True):
        before = first.setdefault(image.resolve(), line.number)
        if before != line.number:
            raise DataError(
                f"{path}: lines {before} and {line.number} both name {image}. List each image once."
            )


def _stems(root: Path, path: Path, images: Sequence[Path]) -> list[str]:
    """Return the image paths without extension, or with it if two differ only there."""
    names = [_relative(root, path, image) for image in images]
    stems = [to_nfc(name.with_suffix("").as_posix()) for name in names]
    counts = Counter(stems)
    return [
        stem if counts[stem] == 1 else to_nfc(name.as_posix())
        for stem, name in zip(stems, names, strict=True)
    ]


def _relative(root: Path, path: Path, image: Path) -> Path:
    for folder in (root, path.parent):
        if image.is_relative_to(folder):
            return image.relative_to(folder)
    return Path(*image.resolve().parts[1:])
