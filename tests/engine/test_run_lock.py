"""Two trainings of one run, and locks that outlive nobody."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcnseg.checkpoint import RESUME_STATE
from dcnseg.engine import run_lock
from dcnseg.engine.run_lock import LOCK, check_is_unlocked, lock_run
from dcnseg.engine.training import resume, train
from dcnseg.engine.training_data import prepare_data
from dcnseg.errors import CheckpointError, TrainingError
from dcnseg.inference.predictor import Predictor
from tests.conftest import small_config


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_a_second_training_is_refused_and_a_prediction_is_not(
    run: Path, scenes: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = (copy / RESUME_STATE).read_bytes()
    text = rf"{copy}: another training is writing to this run folder \(process {os.getpid()} on "
    with lock_run(copy, no_warning):
        with pytest.raises(TrainingError, match=text):
            resume(copy, epochs=3)
        with pytest.raises(TrainingError, match=text):
            train(small_config(scenes), copy, overwrite=True)
        Predictor.from_checkpoint(copy, device="cpu")
    assert (copy / RESUME_STATE).read_bytes() == before
    check_is_unlocked(copy)


def test_two_trainings_that_begin_at_once_do_not_mix(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one takes the folder while this one reads the data."""
    folder = tmp_path / "run"

    def slowly(*args: object, **options: object) -> object:
        other.__enter__()
        return prepare_data(*args, **options)  # type: ignore[arg-type]

    other = lock_run(folder, no_warning)
    monkeypatch.setattr("dcnseg.engine.training.prepare_data", slowly)
    with pytest.raises(TrainingError, match="another training is writing"):
        train(small_config(scenes), folder, overwrite=True)
    other.__exit__(None, None, None)
    assert [path.name for path in folder.iterdir()] == [LOCK]


@contextmanager
def child(folder: Path) -> Iterator[int]:
    """A process that holds the lock, and has forked another one that outlives it."""
    ready, report = os.pipe()
    process = os.fork()
    if process == 0:
        with lock_run(folder, no_warning):
            grandchild = os.fork()
            if grandchild == 0:
                os.close(report)
                time.sleep(120)
                os._exit(0)
            os.write(report, b"%d\n" % grandchild)
            time.sleep(120)
        os._exit(0)
    grandchild = int(os.read(ready, 20))
    try:
        yield process
    finally:
        os.kill(grandchild, signal.SIGKILL)
        os.close(ready)
        os.close(report)


def test_the_lock_ends_with_its_process_even_if_a_child_of_it_lives_on(tmp_path: Path) -> None:
    with child(tmp_path) as process:
        with pytest.raises(TrainingError, match=f"process {process} on "):
            check_is_unlocked(tmp_path)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with lock_run(tmp_path, no_warning):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    """A None stands for a platform without flock."""

    def flock(_descriptor: int, _operation: int) -> None:
        assert number is not None
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.setattr(run_lock, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", flock)
    warnings: list[str] = []
    with lock_run(tmp_path, warnings.append):
        check_is_unlocked(tmp_path)
    (text,) = warnings
    assert text.startswith(f"{tmp_path}: its file system has no locks")


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with (
        pytest.raises(CheckpointError, match=rf"{LOCK} cannot be written: Is a directory"),
        lock_run(tmp_path, no_warning),
    ):
        pass


def test_nothing_is_written_to_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resume(tmp_path)
    assert not list(tmp_path.iterdir())
