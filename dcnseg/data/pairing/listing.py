"""The files below a folder, without what others than its owner put there; entry `find_files`."""

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
# Of a run folder made before these were marked; nothing else has these three.
_RUN_FILES: Final = ("config.json", "files.json", "metrics.jsonl")


def find_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files with these endings (lower case, with dot) in `folder` and below, sorted.

    Hidden files and folders are passed over, links to folders are followed. FIFOs, sockets and
    devices are skipped, and so are the folders below `folder` that dcnseg has written.
    """
    return sorted(
        path for path in _walk(folder) if path.suffix.lower() in suffixes and not _is_special(path)
    )


def find_images(folder: Path) -> list[Path]:
    """Return the image files in `folder` and its subfolders, sorted, without hidden ones."""
    return find_files(folder, IMAGE_SUFFIXES)


def find_unsupported(folder: Path) -> dict[Path, str]:
    """Return what `find_images` skips although somebody may expect it to be read, and why."""
    found: dict[Path, str] = {}
    for path in _walk(folder, found):
        kind = UNSUPPORTED_KINDS.get(path.suffix.lower())
        if kind:
            found[path] = f"{kind}; convert it to PNG or JPEG to have it read"
        elif path.suffix.lower() in IMAGE_SUFFIXES | {".json"} and _is_special(path):
            found[path] = NOT_REGULAR
    return dict(sorted(found.items()))


def _walk(folder: Path, skipped: dict[Path, str] | None = None) -> Iterator[Path]:
    """Yield the files below a folder.

    Folders that dcnseg has written, or that cannot be read, are put into `skipped`.

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
    """Whether a folder is there, and dcnseg has not written it."""
    return folder.is_dir() and not written_by_dcnseg(folder)


def written_by_dcnseg(folder: Path) -> str:
    """Say by what it is seen that dcnseg has written a folder; empty if it has not."""
    if is_output_folder(folder):
        return f"written by dcnseg, as {OUTPUT_MARKER} in it says"
    if all(os.path.isfile(folder / name) for name in _RUN_FILES):  # noqa: PTH113  (as above)
        return "a run folder of dcnseg train"
    return ""


def _is_special(path: Path) -> bool:
    """Whether a path is a FIFO, a socket or a device; what is missing, as a broken link, is not."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode)


def first_names(paths: Sequence[Path], folder: Path) -> str:
    """Write up to five of the paths, relative to `folder` where they lie below it."""
    names = [
        (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()
        for path in paths[:5]
    ]
    return ", ".join(names) + (", ..." if len(paths) > 5 else "")
