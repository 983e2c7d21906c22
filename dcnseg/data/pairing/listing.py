"""Lists the files below a folder, without hidden and generated ones; entry `find_files`."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from dcnseg.data.image_file import IMAGE_SUFFIXES, UNSUPPORTED_KINDS
from dcnseg.errors import DataError
from dcnseg.files import OUTPUT_MARKER, is_output_folder

NOT_REGULAR: Final = "not a regular file"
UNREADABLE: Final = "a folder that cannot be read"
_SKIPPED_FOLDERS: Final = frozenset({"__MACOSX", "__pycache__"})
# Run folders of early versions have no marker; nothing else has these three files.
_RUN_FILES: Final = ("config.json", "files.json", "metrics.jsonl")


def find_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files with these suffixes (lower case, with dot) in `folder` and below, sorted.

    Links to folders are followed. Hidden files and folders, FIFOs, sockets, devices, and folders
    below `folder` that dcnseg has written are skipped.
    """
    return sorted(
        path for path in _walk(folder) if path.suffix.lower() in suffixes and not _is_special(path)
    )


def find_images(folder: Path) -> list[Path]:
    """Return the image files in `folder` and its subfolders, sorted, without hidden ones."""
    return find_files(folder, IMAGE_SUFFIXES)


def find_unsupported(folder: Path) -> dict[Path, str]:
    """Return the files and folders that a user may expect `find_images` to read, and the reason."""
    found: dict[Path, str] = {}
    for path in _walk(folder, found):
        kind = UNSUPPORTED_KINDS.get(path.suffix.lower())
        if kind:
            found[path] = f"{kind}; convert it to PNG or JPEG"
        elif path.suffix.lower() in IMAGE_SUFFIXES | {".json"} and _is_special(path):
            found[path] = NOT_REGULAR
    return dict(sorted(found.items()))


def _walk(folder: Path, skipped: dict[Path, str] | None = None) -> Iterator[Path]:
    """Yield the files below a folder.

    Folders that dcnseg has written or that cannot be read are added to `skipped`.

    Raises:
        DataError: `folder` itself cannot be read.
    """

    def skip(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise DataError(f"{folder}: cannot be read ({error.strerror}).") from error
        if skipped is not None:
            skipped[Path(error.filename)] = f"{UNREADABLE} ({error.strerror})"

    visited: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=skip, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        kept = []
        for name in folders:
            if name.startswith(".") or name in _SKIPPED_FOLDERS:
                continue
            reason = written_by_dcnseg(Path(parent, name))
            if not reason:
                kept.append(name)
            elif skipped is not None:
                skipped[Path(parent, name)] = reason
        folders[:] = kept
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def is_data_folder(folder: Path) -> bool:
    """Whether a folder exists and dcnseg has not written it."""
    return folder.is_dir() and not written_by_dcnseg(folder)


def written_by_dcnseg(folder: Path) -> str:
    """Return how a folder is recognized as written by dcnseg; empty if it is not."""
    if is_output_folder(folder):
        return f"written by dcnseg, it contains {OUTPUT_MARKER}"
    if all(os.path.isfile(folder / name) for name in _RUN_FILES):  # noqa: PTH113  (as above)
        return "a run folder of dcnseg train"
    return ""


def _is_special(path: Path) -> bool:
    """Whether a path is a FIFO, a socket or a device; a missing file or broken link is not."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode)


def first_names(paths: Sequence[Path], folder: Path) -> str:
    """Return up to five paths as text, relative to `folder` if they are below it."""
    names = [
        (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
        for path in paths[:5]
    ]
    return ", ".join(names) + (", ..." if len(paths) > 5 else "")
