"""Whether a run may write to its folder: empty, apart from the data, and locked.

The lock is the operating system's (flock), so it ends with the process that holds it. Reading a run
needs no lock.

Entry points: `check_run_is_free`, `check_out_is_separate`, `lock_run`, `check_is_unlocked`.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from dcnseg.data.pairing.splits import Splits
from dcnseg.engine.run_folder import CLASSES, explain_write_errors
from dcnseg.errors import CheckpointError, ConfigError, TrainingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_ADVICE = "Choose a folder outside the data, such as --out runs/first."
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_held: set[int] = set()  # descriptors


def check_run_is_free(run: Path, *, overwrite: bool) -> None:
    """Raise a ConfigError or CheckpointError if a new run cannot be written to this folder."""
    if run.exists() and not run.is_dir():
        raise ConfigError(f"--out {run} is a file; expected a folder for the run.")
    if run.is_dir() and any(run.iterdir()) and not overwrite:
        raise ConfigError(
            f"--out {run} is not empty. Choose another folder, add --overwrite, or resume its "
            f"run: dcnseg train --resume {run}"
        )
    existing = next(folder for folder in (run, *run.absolute().parents) if folder.is_dir())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"--out {run} cannot be written: no permission to write to {existing}. Choose another "
            "folder."
        )


def check_out_is_separate(run: Path, root: Path, splits: Splits | None = None) -> None:
    """Raise a ConfigError if the run folder overlaps with the data folder, or with the files."""
    out = run.resolve()
    if root.resolve().is_relative_to(out):
        raise ConfigError(
            f"--out {run} {'is' if root.resolve() == out else 'contains'} the data folder {root}, "
            f"whose {CLASSES} or other files the run would overwrite. {_ADVICE}"
        )
    for folder in _folders_of(splits or Splits()):
        if folder.is_relative_to(out) or out.is_relative_to(folder):
            relation = "contains" if folder.is_relative_to(out) else "lies in"
            relation = "is" if folder == out else relation
            raise ConfigError(
                f"--out {run} {relation} {folder}, a folder of the data's images or masks. "
                f"{_ADVICE}"
            )


def _folders_of(splits: Splits) -> list[Path]:
    """List the folders of the images and masks, without their subfolders."""
    folders = {
        # For sub/a.png with the stem sub/a, the folder that contains sub.
        file.parents[len(parts) - 1 if file.parts[-len(parts) : -1] == parts[:-1] else 0].resolve()
        for sample in splits.all_samples()
        for file in (sample.image, sample.mask)
        for parts in (PurePath(sample.stem).parts,)
    }
    return sorted(folders)


@contextmanager
def lock_run(run: Path, on_warning: Callable[[str], None]) -> Iterator[None]:
    """Lock a run folder against other training processes, and other runs in this process.

    Raises:
        TrainingError: another training holds the lock; the message names its process.
        CheckpointError: the folder cannot be written.
    """
    with explain_write_errors(run / LOCK):
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        if _acquire(descriptor, run):
            os.ftruncate(descriptor, 0)
            holder = f"process {os.getpid()} on {socket.gethostname()}\n"
            os.pwrite(descriptor, holder.encode(), 0)
        else:
            on_warning(
                f"{run}: the file system does not support locks. Make sure that no other process "
                "trains the same run."
            )
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def check_is_unlocked(run: Path) -> None:
    """Raise a TrainingError if a run is training in the folder, which may not exist."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        descriptor = os.open(run / LOCK, os.O_RDWR)
        try:
            _acquire(descriptor, run)
        finally:
            os.close(descriptor)


def _acquire(descriptor: int, run: Path) -> bool:
    """Acquire the lock; return False if locks are not supported."""
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
            f"{run}: another process is training in this run folder ({holder or 'starting'}). Wait "
            "for it to finish, or choose another --out. You can predict with the run meanwhile."
        ) from error
    return True


def _release_in_child() -> None:
    """Release the lock in data loading workers, which may outlive a killed main process."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
