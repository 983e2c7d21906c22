"""Safe reading and writing of files.

Files are written atomically (`atomic_path`); only regular files are read (`open_regular_file`,
`read_text`, `read_json`), with errors that name them (`explain_unreadable`); output folders are
marked so that a later command does not read them as input (`mark_output_folder`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

from dcnseg.errors import DataError

OUTPUT_MARKER: Final = ".dcnseg-output"
MAX_JSON_BYTES: Final = 1 << 30  # COCO annotations of large datasets have hundreds of MB
_TEMPORARY: Final = re.compile(r"\.[0-9a-f]{16}\.tmp")  # names from `atomic_path`
_MAX_DIGITS: Final = 4300  # Python's own limit, checked here for a clearer message
MARKER_TEXT: Final = (
    "dcnseg wrote the files in this folder and skips the folder when it searches for input files.\n"
    "Delete this file to use the folder as input.\n"
)


@contextmanager
def explain_unreadable(path: Path, expected: str) -> Iterator[None]:
    """Convert OSError and ValueError into a DataError; `expected` is the kind of file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise DataError(f"{path}: is not {expected} ({error}).") from error


@contextmanager
def atomic_path(path: Path, *, is_durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path` and rename it to `path` on success.

    Readers see either the old file or the complete new one. The temporary name starts with a dot
    and keeps the suffix of `path`: folder scans skip files that a killed process left, and writers
    that choose a format by the suffix work. Missing parent folders are created.

    Args:
        path: The file to write; an existing file is replaced.
        is_durable: Flush the content to the disk, so that it survives a power failure. Off for
            many small files that are easy to recreate.

    Raises:
        OSError: The folder cannot be written or the disk is full; `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, because the final name may already have the maximum length.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        yield temporary
        if is_durable:
            _flush_to_disk(temporary, os.O_RDWR)
        os.replace(temporary, path)  # noqa: PTH105  (atomic)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if is_durable and os.name == "posix":
        with suppress(OSError):  # some network file systems cannot flush a folder
            _flush_to_disk(path.parent, os.O_RDONLY)  # makes the rename durable


def _flush_to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular_file(path: Path) -> IO[bytes]:
    """Open a regular file for reading; never blocks on a FIFO.

    Raises:
        OSError: The file cannot be opened, or is a FIFO, socket, device or folder.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: The file is not UTF-8, or larger than 1 GiB.
    """
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"the file has {size} bytes; expected at most {MAX_JSON_BYTES}")
        return file.read().decode("utf-8-sig")


def read_json(path: Path, *, has_file_names: bool = False) -> Any:
    """Read a UTF-8 JSON file, with or without a byte order mark.

    Args:
        path: The file.
        has_file_names: Accept file names that are not UTF-8, as returned by `os.fsdecode`.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        ValueError: The file is not JSON, is larger than 1 GiB or nested too deeply, or has an
            integer of more than 4300 digits or an unpaired surrogate.
    """
    return parse_json(read_text(path), has_file_names=has_file_names)


def parse_json(text: str, *, has_file_names: bool = False) -> Any:
    """Parse JSON text; `has_file_names` and errors as for `read_json`."""
    try:
        content = json.loads(text, parse_int=_parse_int)
        if "\\u" in text:  # decoded UTF-8 has surrogates only as escapes
            errors = "surrogateescape" if has_file_names else "strict"
            json.dumps(content, ensure_ascii=False).encode("utf-8", errors)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it has an unpaired surrogate such as \\ud800") from error
    return content


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits; the limit is {_MAX_DIGITS}")
    return int(digits)


def mark_output_folder(folder: Path) -> None:
    """Mark a folder as written by dcnseg, creating it if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / OUTPUT_MARKER
    if not marker.exists():
        with atomic_path(marker, is_durable=False) as temporary:
            temporary.write_text(MARKER_TEXT, encoding="utf-8")


def is_output_folder(folder: Path) -> bool:
    """Whether a folder is marked as written by dcnseg."""
    return os.path.exists(folder / OUTPUT_MARKER)  # noqa: PTH110  (pathlib raises PermissionError)


def has_unmarked_files(folder: Path) -> bool:
    """Whether a folder has any content and is not marked as written by dcnseg.

    Temporary files do not count: another command that starts at the same time may just be writing
    the mark, which comes before all other files.
    """
    return folder.is_dir() and _has_content(folder) and not is_output_folder(folder)


def _has_content(folder: Path) -> bool:
    return any(not _TEMPORARY.match(path.name) for path in folder.iterdir())
