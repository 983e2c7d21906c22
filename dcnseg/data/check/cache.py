"""Caches facts about unchanged files between checks; the entry point is `FactsCache`.

The cache is a JSON file in the user's cache folder, never in the data folder. If it cannot be read
or written, all files are inspected again; no result depends on it.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from dcnseg import __version__
from dcnseg.files import atomic_path, read_text

_FORMAT: Final = f"2 of dcnseg {__version__}"


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/dcnseg`, or `~/.cache/dcnseg`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dcnseg"


class FactsCache:
    """Facts about the files of one data folder, by name, size and modification time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path: Path | None = None
        self._known: dict[str, Any] = {}
        self._used: dict[str, Any] = {}
        with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
            name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
            self._path = cache_folder() / f"check-{name}.json"
            self._known = _load(self._path)

    def get(self, path: Path, role: str) -> dict[str, Any] | None:
        """Return the facts of a file in a role (image, mask) if it is unchanged, else None."""
        key = self._key(path, role)
        entry = self._known.get(key)
        if not isinstance(entry, dict) or entry.get("stamp") != file_stamp(path):
            return None
        facts = entry.get("facts")
        if not isinstance(facts, dict):
            return None
        self._used[key] = entry
        return facts

    def put(self, path: Path, role: str, stamp: list[int] | None, facts: dict[str, Any]) -> None:
        """Store the facts of a file that had this stamp."""
        if stamp is not None:
            self._used[self._key(path, role)] = {"stamp": stamp, "facts": facts}

    def _key(self, path: Path, role: str) -> str:
        is_inside = path.is_relative_to(self._root)
        return f"{role} {path.relative_to(self._root) if is_inside else path.resolve()}"

    def save(self) -> None:
        """Write the facts that were used or added, if any are new; drop the others."""
        if self._path is None or self._used == self._known:
            return
        text = json.dumps({"format": _FORMAT, "files": self._used})
        with suppress(OSError), atomic_path(self._path, is_durable=False) as temporary:
            temporary.write_text(text, encoding="ascii")


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return {}
    files = content.get("files")
    return files if isinstance(files, dict) else {}


def file_stamp(path: Path) -> list[int] | None:
    """Return size and modification time of a file; call it before reading the file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
