"""One training at a time writes to a run folder; entry points `lock_run`, `check_is_unlocked`.

The lock is the operating system's (flock), so it ends with the process that holds it, however that
ends. Reading a run needs no lock.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dcnseg.engine.run_folder import add_file_to_errors
from dcnseg.errors import TrainingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_held: set[int] = set()  # descriptors


@contextmanager
def lock_run(run: Path, on_warning: Callable[[str], None]) -> Iterator[None]:
    """Within it, no other process (and no other training of this one) writes to the run folder.

    Args:
        run: The run folder; made if it is missing.
        on_warning: Told if the file system has no locks.

    Raises:
        TrainingError: another training holds the lock; the message names its process.
        CheckpointError: the folder cannot be written.
    """
    with add_file_to_errors(run / LOCK):
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        if _take(descriptor, run):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _own_name().encode(), 0)
        else:
            on_warning(
                f"{run}: its file system has no locks, so a second training of the same run would "
                "not be noticed. Take care that there is one only."
            )
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def check_is_unlocked(run: Path) -> None:
    """Raise a TrainingError if a training is writing to the folder, which need not exist."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        descriptor = os.open(run / LOCK, os.O_RDWR)
        try:
            _take(descriptor, run)
        finally:
            os.close(descriptor)


def _take(descriptor: int, run: Path) -> bool:
    """Take the lock; False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
        raise TrainingError(
            f"{run}: another training is writing to this run folder ({holder or 'starting'}). Wait "
            "until it has ended, or give another --out. Predicting beside it is fine."
        ) from error
    return True


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}\n"


def _forget_in_child() -> None:
    """A process that loads images must not keep the lock of a main process that was killed."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
