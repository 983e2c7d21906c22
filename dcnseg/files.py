"""Reading and writing files safely.

Written files appear complete or not at all (`atomic_path`); only regular files are read
(`open_regular_file`, `read_text`, `read_json`); folders that dcnseg writes are marked, so that
their content is not taken for input later (`mark_output_folder`).
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

OUTPUT_MARKER: Final = ".dcnseg-output"
MAX_JSON_BYTES: Final = 1 << 30  # COCO annotations of a large dataset have some hundred megabytes
_MAX_DIGITS: Final = 4300  # Python's own limit, whose error speaks to programmers
_MARKER_TEXT: Final = (
    "The files in this folder were written by dcnseg. Where the folder lies inside another one\n"
    "that dcnseg reads, it is skipped. Delete this file to have it read.\n"
)


@contextmanager
def atomic_path(path: Path, *, is_durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move what was written there to `path` at the end.

    A reader sees the old file or the whole new one, never a part. The temporary name starts with a
    dot and ends as `path` does, so writers that go by the suffix work and folder scans pass over
    what a killed process leaves behind. Missing parent folders are made.

    Args:
        path: Where the file shall appear; an existing file is replaced.
        is_durable: Wait until the disk holds the content, so that it outlives a power cut. Off for
            the many small files that can simply be made again.

    Raises:
        OSError: The folder cannot be written or the disk is full; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short on purpose: the final name may already be as long as the file system allows.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        yield temporary
        if is_durable:
            _flush_to_disk(temporary, os.O_RDWR)
        os.replace(temporary, path)  # noqa: PTH105  (the atomicity is the point)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if is_durable and os.name == "posix":
        with suppress(OSError):  # some network file systems cannot flush a folder
            _flush_to_disk(path.parent, os.O_RDONLY)  # the rename is content of the folder


def _flush_to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular_file(path: Path) -> IO[bytes]:
    """Open a file for reading, without waiting for the other end of a FIFO.

    Raises:
        OSError: The file cannot be opened, or is a FIFO, a socket, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: It is not UTF-8, or larger than 1 GiB.
    """
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"it has {size} bytes; expected at most {MAX_JSON_BYTES}")
        return file.read().decode("utf-8-sig")


def read_json(path: Path, *, has_file_names: bool = False) -> Any:
    """Read a JSON file in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        has_file_names: Accept names of files that are not UTF-8, as `os.fsdecode` gives them.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: It is not JSON, or more than a reader can take: it is larger than 1 GiB, nested
            too deep, or has a number of thousands of digits or half of a surrogate pair.
    """
    return parse_json(read_text(path), has_file_names=has_file_names)


def parse_json(text: str, *, has_file_names: bool = False) -> Any:
    """Parse JSON text.

    Args:
        text: The text.
        has_file_names: As `read_json`.

    Raises:
        ValueError: As `read_json`.
    """
    try:
        content = json.loads(text, parse_int=_parse_int)
        if "\\u" in text:  # the only way to a surrogate in a text that was decoded from UTF-8
            errors = "surrogateescape" if has_file_names else "strict"
            json.dumps(content, ensure_ascii=False).encode("utf-8", errors)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except UnicodeEncodeError as error:
        raise ValueError("it has half of a surrogate pair, such as \\ud800") from error
    return content


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits; expected at most {_MAX_DIGITS}")
    return int(digits)


def mark_output_folder(folder: Path) -> None:
    """Mark a folder as written by dcnseg; the folder is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / OUTPUT_MARKER
    if not marker.exists():
        with atomic_path(marker, is_durable=False) as temporary:
            temporary.write_text(_MARKER_TEXT, encoding="utf-8")


def is_output_folder(folder: Path) -> bool:
    """Whether dcnseg has marked this folder as its own output."""
    return os.path.exists(folder / OUTPUT_MARKER)  # noqa: PTH110  (pathlib's needs permission)


def holds_foreign_files(folder: Path) -> bool:
    """Whether a folder holds anything, and dcnseg has not marked it as its output."""
    return folder.is_dir() and any(folder.iterdir()) and not is_output_folder(folder)
