"""The files below a folder, without what operating systems leave there; entry `find_files`."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from dcnseg.data.image_io import IMAGE_SUFFIXES

_SKIPPED_FOLDERS: Final = frozenset({"__MACOSX", "__pycache__"})


def find_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files with these endings (lower case, with dot) in `folder` and below, sorted.

    Hidden files and folders are passed over, links to folders are followed.
    """
    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [n for n in folders if not n.startswith(".") and n not in _SKIPPED_FOLDERS]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return sorted(found)


def find_images(folder: Path) -> list[Path]:
    """Return the picture files in `folder` and its subfolders, sorted, without hidden ones."""
    return find_files(folder, IMAGE_SUFFIXES)


def composed(text: str) -> str:
    """Return `text` in NFC: one file system writes "ü" as one character, the next as two."""
    return unicodedata.normalize("NFC", text)


def first_names(paths: Sequence[Path], folder: Path) -> str:
    """Write up to five of the paths, relative to `folder` where they lie below it."""
    names = [
        (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
        for path in paths[:5]
    ]
    return ", ".join(names) + (", ..." if len(paths) > 5 else "")
