"""Files that appear complete or not at all; the entry point is `atomic_path`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
