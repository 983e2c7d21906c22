"""Runs that are killed or stopped, and disks that are full."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcnseg import checkpoint, files
from dcnseg.checkpoint import (
    BEST_WEIGHTS,
    RESUME_STATE,
    load_resume_state,
    load_segmenter,
    save_resume_state,
)
from dcnseg.config import ModelConfig, to_dict
from dcnseg.engine import metrics, run_folder
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import CONFIG, METRICS
from dcnseg.engine.training import resume, train
from dcnseg.errors import CheckpointError, TrainingStoppedError
from tests.conftest import small_config
from tests.engine.runs import KillAfter, KilledError, Recorder, assert_same_run

ROOT = Path(__file__).parents[2]

# Trains and resumes a run in forked processes, each killed by SIGKILL at a random moment: after a
# step, or before or after a file is flushed or renamed, with half of the flushed file truncated.
# Prints the number of processes.
KILL_REPEATEDLY = """
import json, os, random, signal, sys
from pathlib import Path
import torch
from dcnseg.config import TrainConfig, from_dict
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.training import resume, train

run, settings, seed = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
straight = run.with_name("straight")
torch.set_num_threads(1)
left = None

def kill_if_due(descriptor=None):
    global left
    if left is None:
        return
    left -= 1
    if left <= 0:
        if descriptor is not None and os.path.isfile(f"/dev/fd/{descriptor}"):
            os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

def killing(function):
    def wrapper(first, *rest):
        kill_if_due(first if function is fsync else None)
        if function is not fsync:  # slow, and without effect on a killed process
            function(first, *rest)
        kill_if_due()
    return wrapper

fsync = os.fsync
os.fsync, os.replace = killing(os.fsync), killing(os.replace)

class Listener(TrainingListener):
    def step_done(self, step):
        kill_if_due()

def run_once(run, count):
    global left
    left = count
    if (run / "last.ckpt").exists():
        resume(run, listener=Listener())
    else:
        train(from_dict(TrainConfig, settings), run, overwrite=True, listener=Listener())

draw = random.Random(seed)
for attempt in range(100):
    count = draw.randint(10, 45) if attempt else None  # the first is not killed
    child = os.fork()
    if child == 0:
        try:
            run_once(run if attempt else straight, count)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(0 if "is complete" in str(error) else 1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and (attempt or os.WEXITSTATUS(status)):
        print(attempt)
        sys.exit(os.WEXITSTATUS(status))
"""


def test_a_run_killed_at_any_moment_equals_an_uninterrupted_one(
    scenes: Path, tmp_path: Path
) -> None:
    config = small_config(scenes, batch_size=2, accumulate=2, ema=0.9, checkpoint_minutes=1e-9)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-c", KILL_REPEATEDLY, str(killed), json.dumps(to_dict(config)), "7"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.splitlines()[-1]) > 2
    assert_same_run(killed, straight)
    assert not list(killed.glob(".*.tmp.*"))


def test_a_run_stopped_anywhere_equals_an_uninterrupted_one(scenes: Path, tmp_path: Path) -> None:
    """Stopped after a step, during the evaluation and between epochs."""
    config = small_config(scenes, batch_size=2, patience=5)
    config = replace(config, data=replace(config.data, workers=1))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config, straight)
    with pytest.raises(TrainingStoppedError, match="was stopped; its checkpoint is saved"):
        train(config, stopped, listener=Recorder(stop_at=2))  # after the second step
    assert load_resume_state(stopped / RESUME_STATE)["so_far"]["step"] == 2
    with pytest.raises(TrainingStoppedError):
        resume(stopped, listener=Recorder(stop_at=4))  # after the second validation image
    with pytest.raises(TrainingStoppedError):
        resume(stopped, listener=Recorder(stop_at=4))  # after the epoch
    assert load_resume_state(stopped / RESUME_STATE)["so_far"] is None
    resume(stopped)
    assert_same_run(stopped, straight)


@pytest.mark.parametrize("region_ohem", [False, True])
def test_a_stopped_run_with_a_region_head_equals_an_uninterrupted_one(
    scenes: Path, tmp_path: Path, region_ohem: bool
) -> None:
    """Regions are drawn with random numbers, also in the epoch that is interrupted."""
    model = ModelConfig(
        encoder="resnet18",
        encoder_depth=3,
        architecture="plain",
        region_head="deformable-rfcn",
        region_min_area=16,
    )
    config = small_config(scenes, model=model, batch_size=2, ema=0.9, region_ohem=region_ohem)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config, straight)
    with pytest.raises(TrainingStoppedError):
        train(config, stopped, listener=Recorder(stop_at=2))  # after the second step
    assert load_resume_state(stopped / RESUME_STATE)["so_far"]["step"] == 2
    resume(stopped)
    assert_same_run(stopped, straight)
    best, info = load_segmenter(stopped / BEST_WEIGHTS)
    assert info.model == model
    # The offsets of the regions start at zero and have been learned.
    assert best.get_parameter("region_head.votes.pool.offset_branch.weight").any()


@pytest.mark.slow
def test_a_checkpoint_older_than_the_metrics_is_resumed(scenes: Path, tmp_path: Path) -> None:
    config = small_config(
        scenes, epochs=4, ema=0.9, checkpoint_minutes=0.0, checkpoint_epochs=2, lr=0.05
    )
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(config, straight)
    with pytest.raises(KilledError):
        train(config, killed, listener=KillAfter(3))
    assert load_resume_state(killed / RESUME_STATE)["epoch"] == 2
    assert len(read_metrics(killed)) == 3
    resume(killed)
    assert_same_run(killed, straight)


@pytest.mark.parametrize("name", [RESUME_STATE, METRICS, BEST_WEIGHTS, CONFIG])
def test_a_full_disk_is_explained_and_the_checkpoint_is_kept(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    saved = load_resume_state(run_copy / RESUME_STATE)
    save_resume_state(run_copy / RESUME_STATE, saved | {"best_scores": {"mean_iou": 0.0}})
    before = (run_copy / RESUME_STATE).read_bytes()
    original = files.atomic_path

    @contextmanager
    def refuse(path: Path) -> Iterator[Path]:
        with original(path) as temporary:
            yield temporary
            if path.name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module in (run_folder, metrics, checkpoint):
        monkeypatch.setattr(module, "atomic_path", refuse)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be written: No space left on dev"):
        resume(run_copy, epochs=3)
    assert (run_copy / RESUME_STATE).read_bytes() == before
    assert not list(run_copy.glob(".*.tmp.*"))


def test_an_incomplete_write_of_a_checkpoint_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / RESUME_STATE
    save_resume_state(path, {"epoch": 1})
    monkeypatch.setattr(checkpoint, "atomic_path", lambda path: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left on device"):
        save_resume_state(path, {"model": torch.zeros(100_000)})
    assert load_resume_state(path)["epoch"] == 1
