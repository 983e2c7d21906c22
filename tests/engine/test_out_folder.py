"""Folders that a run must not write to, and locks."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcnseg.checkpoint import RESUME_STATE
from dcnseg.data.pairing.splits import Splits
from dcnseg.data.sample import Sample
from dcnseg.engine import out_folder
from dcnseg.engine.out_folder import LOCK, check_is_unlocked, check_out_is_separate, lock_run
from dcnseg.engine.training import resume, train
from dcnseg.engine.training_data import find_training_splits, prepare_data
from dcnseg.errors import CheckpointError, ConfigError, TrainingError
from dcnseg.inference.predictor import Predictor
from tests.conftest import small_config


def test_a_used_folder_is_refused(run: Path, scenes: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    with pytest.raises(ConfigError, match=r"is not empty.*--overwrite.*--resume"):
        train(small_config(scenes), run)
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (".", "is the data folder"),
        ("..", "contains the data folder"),
        ("train/images", "is .*train/images, a folder of the data's images or masks"),
        ("train/masks/deep/run", "lies in .*train/masks, a folder of"),
        ("val", "contains .*val/images, a folder of"),
        ("../link/run", "lies in .*val/masks, a folder of"),
    ],
)
def test_a_run_inside_the_data_is_refused(
    data_copy: Path, tmp_path: Path, out: str, text: str
) -> None:
    (tmp_path / "link").symlink_to(data_copy / "val" / "masks")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=rf"--out .* {text}"):
        train(small_config(data_copy), data_copy / out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_without_data_inside_the_data_folder_are_allowed(scenes: Path) -> None:
    splits = find_training_splits(small_config(scenes))
    for out in (scenes / "runs" / "a", scenes.parent / "scenes2", scenes / "train" / "images2"):
        check_out_is_separate(out, scenes, splits)


def test_subfolders_of_images_are_protected_with_their_parent(tmp_path: Path) -> None:
    sample = Sample(tmp_path / "images/a/b/1.png", tmp_path / "masks/a/b/1_m.png", "a/b/1")
    for out in ("images/run", "images/a/run", "masks/c"):
        with pytest.raises(ConfigError, match="a folder of the data's images or masks"):
            check_out_is_separate(tmp_path / out, tmp_path, Splits(train=(sample,)))


def test_a_folder_without_permission_is_reported_before_the_images_are_read(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for `os.access`, since root may write everywhere."""
    asked: list[Path] = []
    monkeypatch.setattr(os, "access", lambda path, _mode: asked.append(path))
    with pytest.raises(CheckpointError, match=r"new/run cannot be written: no permission"):
        train(small_config(scenes), tmp_path / "new" / "run")
    assert asked == [tmp_path]


def test_nothing_is_written_to_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json; expected a run folder"):
        resume(tmp_path)
    assert not list(tmp_path.iterdir())


def no_warning(text: str) -> None:
    raise AssertionError(text)


def test_a_locked_run_can_be_used_for_prediction_only(run_copy: Path, scenes: Path) -> None:
    before = (run_copy / RESUME_STATE).read_bytes()
    text = rf"{run_copy}: another process is training in this run folder \(process {os.getpid()} on"
    with lock_run(run_copy, no_warning):
        with pytest.raises(TrainingError, match=text):
            resume(run_copy, epochs=3)
        with pytest.raises(TrainingError, match=text):
            train(small_config(scenes), run_copy, overwrite=True)
        Predictor.from_checkpoint(run_copy, device="cpu")
    assert (run_copy / RESUME_STATE).read_bytes() == before
    check_is_unlocked(run_copy)


def test_a_run_that_was_locked_while_the_data_was_read_is_refused(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    other = lock_run(folder, no_warning)

    def prepare_slowly(*args: object, **options: object) -> object:
        other.__enter__()
        return prepare_data(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("dcnseg.engine.training.prepare_data", prepare_slowly)
    with pytest.raises(TrainingError, match="another process is training"):
        train(small_config(scenes), folder, overwrite=True)
    other.__exit__(None, None, None)
    assert [path.name for path in folder.iterdir()] == [LOCK]


@contextmanager
def locking_process(folder: Path) -> Iterator[int]:
    """A process that holds the lock and has a child that outlives it."""
    ready, report = os.pipe()
    process = os.fork()
    if process == 0:
        with lock_run(folder, no_warning):
            if grandchild := os.fork():
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


def test_the_lock_ends_with_its_process_even_if_a_child_survives(tmp_path: Path) -> None:
    with locking_process(tmp_path) as process:
        with pytest.raises(TrainingError, match=f"process {process} on "):
            check_is_unlocked(tmp_path)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with lock_run(tmp_path, no_warning):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    """None stands for a platform without flock."""

    def flock(_descriptor: int, _operation: int) -> None:
        assert number is not None
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.setattr(out_folder, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", flock)
    warnings: list[str] = []
    with lock_run(tmp_path, warnings.append):
        check_is_unlocked(tmp_path)
    (text,) = warnings
    assert text.startswith(f"{tmp_path}: the file system does not support locks")


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    text = rf"{LOCK} cannot be written: Is a directory"
    with pytest.raises(CheckpointError, match=text), lock_run(tmp_path, no_warning):
        pass
