"""Runs that are killed, stopped, starved or fed with nonsense."""

from __future__ import annotations

import copy
import errno
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dcnseg import checkpoint, files
from dcnseg.checkpoint import BEST_WEIGHTS, RESUME_STATE, load_resume_state, save_resume_state
from dcnseg.config import to_dict
from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import SegmentationDataset
from dcnseg.device import free_memory
from dcnseg.engine import batch_size, loading, run_folder
from dcnseg.engine import trainer as trainer_module
from dcnseg.engine.batch_size import _largest_that_fits, fitting_batch
from dcnseg.engine.batches import EpochBatches, epoch_batches
from dcnseg.engine.fingerprint import check_files_are_unchanged, write_fingerprints
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.loading import TrainingLoader
from dcnseg.engine.not_finite import first_not_finite
from dcnseg.engine.out_of_memory import explain_out_of_memory
from dcnseg.engine.run_folder import CONFIG, METRICS, PREVIEW, read_metrics
from dcnseg.engine.trainer import Trainer
from dcnseg.engine.training import resume, train
from dcnseg.engine.training_data import find_training_splits, prepare_data
from dcnseg.engine.updates import Outcome
from dcnseg.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    TrainingStoppedError,
)
from tests.conftest import small_config
from tests.engine.test_training import assert_equal_states, timeless_state, without_times

ROOT = Path(__file__).parents[2]

# A fresh process for every life of the run, forked from one that has imported everything. A life
# ends by SIGKILL at a chosen moment: after a step, or before or after a file is flushed or renamed,
# half of the file that is being flushed cut off. The last line is the number of lives.
LIVES = """
import json, os, random, signal, sys
from pathlib import Path
import torch
from dcnseg.config import TrainConfig, from_dict
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.training import resume, train

run, settings, seed = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
straight = run.with_name("straight")
torch.set_num_threads(1)
moments_left = None

def moment(descriptor=None):
    global moments_left
    if moments_left is None:
        return
    moments_left -= 1
    if moments_left <= 0:
        if descriptor is not None and os.path.isfile(f"/dev/fd/{descriptor}"):
            os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

def watched(function):
    def wrapper(first, *rest):
        moment(first if function is fsync else None)
        if function is not fsync:  # which takes long and makes no difference to a killed process
            function(first, *rest)
        moment()
    return wrapper

fsync = os.fsync
os.fsync, os.replace = watched(os.fsync), watched(os.replace)

class Listener(TrainingListener):
    def step_done(self, step):
        moment()

def live(run, count):
    global moments_left
    moments_left = count
    if (run / "last.ckpt").exists():
        resume(run, listener=Listener())
    else:
        train(from_dict(TrainConfig, settings), run, overwrite=True, listener=Listener())

draw = random.Random(seed)
for lives in range(100):
    count = draw.randint(10, 45) if lives else None  # the first is the one that is never killed
    child = os.fork()
    if child == 0:
        try:
            live(run if lives else straight, count)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(0 if "is complete" in str(error) else 1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and (lives or os.WEXITSTATUS(status)):
        print(lives)
        sys.exit(os.WEXITSTATUS(status))
"""


def test_a_run_killed_at_any_moment_ends_as_one_that_never_was(
    scenes: Path, tmp_path: Path
) -> None:
    config = small_config(scenes, batch_size=2, accumulate=2, ema=0.9, checkpoint_minutes=1e-9)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    result = subprocess.run(
        [sys.executable, "-c", LIVES, str(killed), json.dumps(to_dict(config)), "7"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.splitlines()[-1]) > 2  # lives
    assert without_times(killed) == without_times(straight)
    assert_equal_states(timeless_state(killed), timeless_state(straight))
    for name in (BEST_WEIGHTS, PREVIEW):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    assert not list(killed.glob(".*.tmp.*"))


class StopIn(TrainingListener):
    """Asks to stop once so many questions have been asked."""

    def __init__(self, questions: int) -> None:
        self.questions = questions
        self.warnings: list[str] = []

    def stop_requested(self) -> bool:
        self.questions -= 1
        return self.questions < 0

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def test_stopped_in_every_place_a_run_goes_on_as_if_it_had_not(
    scenes: Path, tmp_path: Path
) -> None:
    """After a step, within the evaluation and between epochs; workers load the rest."""
    config = small_config(scenes, batch_size=2, patience=5)
    config = replace(config, data=replace(config.data, workers=1))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config, straight)
    with pytest.raises(TrainingStoppedError, match="was stopped; its state is saved"):
        train(config, stopped, listener=StopIn(1))  # after the second step
    assert load_resume_state(stopped / RESUME_STATE)["so_far"]["step"] == 2
    with pytest.raises(TrainingStoppedError):
        resume(stopped, listener=StopIn(2 + 1))  # after the second of three validation images
    with pytest.raises(TrainingStoppedError):
        resume(stopped, listener=StopIn(3))  # after the epoch
    assert load_resume_state(stopped / RESUME_STATE)["so_far"] is None
    resume(stopped)
    assert without_times(stopped) == without_times(straight)
    assert_equal_states(timeless_state(stopped), timeless_state(straight))


class FailsIn(TrainingListener):
    """Dies without notice when an epoch is done, as a process that is killed does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        if record["epoch"] == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_state_of_some_epochs_ago_is_gone_on_from_as_well(scenes: Path, tmp_path: Path) -> None:
    config = small_config(
        scenes, epochs=4, ema=0.9, checkpoint_minutes=0.0, checkpoint_epochs=2, lr=0.05
    )
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(config, straight)
    with pytest.raises(KeyboardInterrupt):
        train(config, killed, listener=FailsIn(3))
    assert load_resume_state(killed / RESUME_STATE)["epoch"] == 2
    assert len(read_metrics(killed)) == 3
    resume(killed)
    assert without_times(killed) == without_times(straight)
    assert_equal_states(timeless_state(killed), timeless_state(straight))
    assert (killed / BEST_WEIGHTS).read_bytes() == (straight / BEST_WEIGHTS).read_bytes()


class NoLoss:
    """A loss that is NaN in some steps, counted from 1."""

    def __init__(self, steps: set[int], *, in_gradient: bool) -> None:
        self.steps, self.in_gradient = steps, in_gradient
        self.step = 0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.step += 1
        if self.step not in self.steps:
            return logits.square().mean()
        if self.in_gradient:
            return (logits * 0).abs().sqrt().sum()  # 0, with an infinite slope
        return logits.mean() * math.nan


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_gradient: bool
) -> None:
    config = small_config(scenes, batch_size=2, epochs=1, ema=0.9)
    splits = find_training_splits(config)
    trainer = Trainer(
        config, tmp_path, prepare_data(config, splits), TrainingListener(), encoder_weights="none"
    )
    updater = trainer.updater
    monkeypatch.setattr(updater, "_loss", NoLoss({2}, in_gradient=in_gradient))
    trainer.state.model.train()
    images, labels = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64)
    updater.add_batch(images, labels, share=1.0)
    assert updater.update() is Outcome.DONE
    assert trainer.state.average is not None
    parts: list[Any] = [trainer.state.model, trainer.state.average, trainer.state.optimizer]
    kept = [copy.deepcopy(part.state_dict()) for part in parts]
    loss = updater.add_batch(images, labels, share=1.0)
    assert math.isfinite(loss) == in_gradient
    assert updater.update() is Outcome.SKIPPED
    for part, before in zip(parts, kept, strict=True):
        assert_equal_states(part.state_dict(), before)


def test_skipped_steps_are_counted_and_stop_the_run_in_the_end(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    loss = NoLoss({2, 3, 5, 6, 7, 8}, in_gradient=False)
    monkeypatch.setattr(trainer_module, "build_loss", lambda name, weights: loss)
    config = small_config(scenes, batch_size=2, nan_patience=3, epochs=3)
    text = (
        r"of 3 steps in a row was not finite, up to step 3 of epoch 2; the first thing that is not "
        rf"finite there is the loss.*last good checkpoint is {run / RESUME_STATE}"
    )
    with pytest.raises(TrainingError, match=text):
        train(config, run)
    assert [record["skipped_steps"] for record in read_metrics(run)] == [2]
    saved = load_resume_state(run / RESUME_STATE)
    assert saved["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in saved["model"].values())


def test_the_first_layer_that_is_not_finite_is_named(scenes: Path, tmp_path: Path) -> None:
    config = small_config(scenes)
    splits = find_training_splits(config)
    trainer = Trainer(
        config, tmp_path, prepare_data(config, splits), TrainingListener(), encoder_weights="none"
    )
    model = trainer.state.model
    images, labels = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64)

    def find() -> str:
        return first_not_finite(model, trainer.updater, images, labels)

    layer = model.get_submodule("encoder.layer2.0.conv1")
    images[1, 2, 3, 4] = math.nan
    assert find() == "a pixel of the images"
    images[1, 2, 3, 4] = 0
    weight = next(layer.parameters())
    with torch.no_grad():
        weight[0, 0, 0, 0] = math.inf
    assert find() == "the weight encoder.layer2.0.conv1.weight"
    with torch.no_grad():
        weight[0, 0, 0, 0] = 0
    layer.register_forward_hook(lambda _layer, _inputs, output: output * math.inf)
    assert find() == "the output of the layer encoder.layer2.0.conv1"


def test_float16_that_overflows_is_told_from_a_loss_that_is_not_finite(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(scenes)
    splits = find_training_splits(config)
    trainer = Trainer(
        config, tmp_path, prepare_data(config, splits), TrainingListener(), encoder_weights="none"
    )
    trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    infinite = NoLoss(set(range(9)), in_gradient=True)
    monkeypatch.setattr(trainer.updater, "_loss", infinite)
    images, labels = torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64)
    outcomes = []
    for _ in range(2):
        trainer.updater.add_batch(images, labels, share=1.0)
        outcomes.append(trainer.updater.update())
    assert outcomes == [Outcome.SCALED, Outcome.SKIPPED]  # the scale is 1 now


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_another_file_under_the_same_name_is_refused_at_resume(
    run: Path, scenes: Path, tmp_path: Path, kind: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    splits = find_training_splits(small_config(data))
    write_fingerprints(tmp_path, splits)
    check_files_are_unchanged(tmp_path, splits)
    first, second = sorted((data / "val" / kind).iterdir())[:2]
    shutil.copy(first, second)
    with pytest.raises(DataError, match=rf"{second.name}: has changed since the run began \(.* 0 "):
        check_files_are_unchanged(tmp_path, splits)


def test_settings_edited_in_the_run_folder_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    record = json.loads((other / CONFIG).read_text())
    record["settings"] |= {"lr": 0.5, "epochs": 4}
    record["settings"]["model"]["modulated"] = True
    (other / CONFIG).write_text(json.dumps(record))
    text = r"model.modulated is True, was False; .*lr is 0.5, was 0.02"
    with pytest.raises(ConfigError, match=text):
        resume(other)
    with pytest.raises(ConfigError, match="lr cannot be changed when a run is resumed"):
        resume(run, changes={"lr": 1.0})


def test_a_run_that_lost_patience_is_complete(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    saved = load_resume_state(other / RESUME_STATE)
    save_resume_state(other / RESUME_STATE, saved | {"best_epoch": 1})
    with pytest.raises(ConfigError, match="stopped at epoch 2, after 1 epochs without a better"):
        resume(other, changes={"epochs": 5, "patience": 1})


@pytest.mark.parametrize("name", [RESUME_STATE, METRICS, BEST_WEIGHTS, CONFIG])
def test_a_full_disk_is_one_line_and_what_was_there_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    saved = load_resume_state(other / RESUME_STATE)
    save_resume_state(other / RESUME_STATE, saved | {"best_scores": {"mean_iou": 0.0}})
    before = (other / RESUME_STATE).read_bytes()
    full_disk(monkeypatch, name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be written: No space left on dev"):
        resume(other, epochs=3)
    assert (other / RESUME_STATE).read_bytes() == before
    assert not list(other.glob(".*.tmp.*"))


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let no file of this name be finished any more."""
    original = files.atomic_path

    @contextmanager
    def refuse(path: Path) -> Iterator[Path]:
        with original(path) as temporary:
            yield temporary
            if path.name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module in (run_folder, checkpoint):
        monkeypatch.setattr(module, "atomic_path", refuse)


def test_a_state_that_cannot_be_written_wholly_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / RESUME_STATE
    save_resume_state(path, {"epoch": 1})
    monkeypatch.setattr(checkpoint, "atomic_path", lambda path: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left on device"):
        save_resume_state(path, {"model": torch.zeros(100_000)})
    assert load_resume_state(path)["epoch"] == 1


def test_a_folder_that_cannot_be_written_is_told_before_the_images_are_read(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for the question to the system, which lets root write everywhere."""
    asked: list[Path] = []

    def access(path: Path, mode: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(CheckpointError, match=r"new/run cannot be written: .* no permission"):
        train(small_config(scenes), tmp_path / "new" / "run")
    assert asked == [tmp_path]


def test_offsets_that_run_away_are_warned_about_once(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = StopIn(10**9)
    config = small_config(scenes, lr=1e-9)
    splits = find_training_splits(config)
    trainer = Trainer(
        config, tmp_path, prepare_data(config, splits), listener, encoder_weights="none"
    )
    name, layer = next(iter(trainer.state.model.deformable_layers().items()))
    assert layer.conv_offset.bias is not None
    with torch.no_grad():
        layer.conv_offset.bias += 30.0
    trainer.run_epochs()
    (text,) = listener.warnings
    assert text.startswith(f"{name}: the 95th percentile of its offsets is 42 px, and its map is")
    assert "6 px long" in text  # of images of 64x96


def test_a_missing_memory_is_told_with_its_size() -> None:
    text = (
        r"memory of cpu is not enough for a batch of 8 crops of 64x96.*--batch-size 4 "
        r"--accumulate 2, --crop-size 32,48, --amp bf16, or --batch-size auto"
    )
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate"),
    ):
        with (
            pytest.raises(TrainingError, match=text),
            explain_out_of_memory((64, 96), 8, torch.device("cpu")),
        ):
            raise error
    with (
        pytest.raises(RuntimeError, match="another"),
        explain_out_of_memory((64, 96), 8, torch.device("cpu")),
    ):
        raise RuntimeError("another")


@pytest.mark.parametrize(("limit", "size"), [(1, None), (2, 2), (5, 3), (12, 8), (1000, 64)])
def test_the_largest_batch_is_found_by_trying(limit: int, size: int | None) -> None:
    def try_batch(images: int) -> None:
        if images > limit:
            raise torch.OutOfMemoryError

    if size is None:
        with pytest.raises(torch.OutOfMemoryError):
            _largest_that_fits(try_batch)
    else:
        assert _largest_that_fits(try_batch) == size


def test_the_batch_of_a_cpu_follows_its_memory(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for free in (0.0, 6e7, 1e18):
        monkeypatch.setattr(batch_size, "free_memory", lambda free=free: free)
        sizes.append(fitting_batch(small_config(scenes), num_classes=3, num_images=40))
    assert sizes[0] == 2
    assert 2 < sizes[1] < 16
    assert sizes[2] == 16
    assert fitting_batch(small_config(scenes), num_classes=3, num_images=5) == 5
    monkeypatch.undo()
    assert free_memory() > 1e6


class Deadly(SegmentationDataset):
    """Kills its process, or fails, on one image."""

    index = 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == self.index:
            self.fail()
        return super().__getitem__(index)

    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Failing(Deadly):
    def fail(self) -> None:
        raise DataError("image.png: is broken.")


def allow_open_files(count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@contextmanager
def open_files_left(count: int) -> Iterator[None]:
    """Within it, this process can open `count` files more."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while descriptors[-1] < 99:
            descriptors.append(os.dup(descriptors[0]))
        allow_open_files(100 + count)
        yield
    finally:
        allow_open_files(soft)
        for descriptor in descriptors:
            os.close(descriptor)


def loader(scenes: Path, kind: type[Deadly], *, workers: int = 1) -> TrainingLoader:
    splits = find_training_splits(small_config(scenes))
    dataset = kind(splits.train, ClassMap.from_file(scenes / "classes.json"))
    batches = EpochBatches(len(dataset), 2, seed=0)
    return TrainingLoader(dataset, batches, workers=workers, pin_memory=False)


def test_a_worker_that_dies_names_its_file(scenes: Path) -> None:
    deadly = loader(scenes, Deadly)
    sample = find_training_splits(small_config(scenes)).train[Deadly.index]
    text = rf"died: .*It was reading .*{sample.image.name} with .*{sample.mask.name}\. Killed"
    with pytest.raises(TrainingError, match=text), deadly.explain_worker_death():
        list(deadly.batches(1))
    deadly.close()


def test_what_a_worker_finds_wrong_is_said_in_its_own_words(scenes: Path) -> None:
    failing = loader(scenes, Failing)
    with (
        pytest.raises(DataError, match=r"^image\.png: is broken\.$"),
        failing.explain_worker_death(),
    ):
        list(failing.batches(1))
    failing.close()


def test_images_that_were_seen_are_not_loaded_again(scenes: Path) -> None:
    order = epoch_batches(8, 2, seed=0, epoch=1)
    start = next(i for i, batch in enumerate(order) if Deadly.index in batch) + 1
    failing = loader(scenes, Failing)
    assert len(list(failing.batches(1, start=start))) == len(order) - start
    failing.close()


OUT_OF_FILES = "Too many files are open for the processes that load images. Use fewer --workers"


@contextmanager
def closed_afterwards(loader: TrainingLoader) -> Iterator[TrainingLoader]:
    try:
        with loader.explain_worker_death():
            yield loader
    finally:
        loader.close()


@pytest.mark.parametrize("is_collated", [False, True])
def test_a_batch_that_cannot_be_handed_over_ends_the_run(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, is_collated: bool
) -> None:
    """The worker can open nothing before it makes the batch, or before it sends it.

    torch drops a batch that cannot be sent, and would wait for it forever.
    """
    collate = loading._collate

    def starve(items: list[Any]) -> Any:
        if not is_collated:
            allow_open_files(3)
        batch = collate(items)
        allow_open_files(3)
        return batch

    monkeypatch.setattr(loading, "_collate", starve)
    monkeypatch.setattr(Deadly, "index", -1)
    with (
        pytest.raises(TrainingError, match=OUT_OF_FILES),
        closed_afterwards(loader(scenes, Deadly)) as starved,
    ):
        list(starved.batches(1))


@pytest.mark.parametrize("left", [0, 5, 9])
def test_too_few_files_for_the_workers_are_told_before_they_start(scenes: Path, left: int) -> None:
    starved = loader(scenes, Failing)
    with (
        open_files_left(left),
        pytest.raises(TrainingError, match=OUT_OF_FILES),
        closed_afterwards(starved),
    ):
        list(starved.batches(1))
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's __del__
def test_workers_of_a_start_that_failed_halfway_end(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM does not end them, as where a command handles it, so Python would wait for them."""
    handler = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    started: list[Any] = []
    start = multiprocessing.process.BaseProcess.start

    def start_one(process: multiprocessing.process.BaseProcess) -> None:
        if started:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_one)
    with (
        pytest.raises(TrainingError, match=OUT_OF_FILES),
        closed_afterwards(loader(scenes, Failing, workers=2)) as starved,
    ):
        list(starved.batches(1))
    signal.signal(signal.SIGTERM, handler)
    assert started
    assert not started[0].is_alive()
