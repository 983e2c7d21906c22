from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dcnseg.checkpoint import (
    BEST_WEIGHTS,
    RESUME_STATE,
    load_resume_state,
    load_segmenter,
    save_resume_state,
)
from dcnseg.config import ModelConfig, TrainConfig
from dcnseg.data.pairing.splits import Splits
from dcnseg.data.sample import Sample
from dcnseg.engine.listener import RunSummary, Step, TrainingListener
from dcnseg.engine.run_folder import (
    CONFIG,
    METRICS,
    PREVIEW,
    check_out_is_separate,
    read_metrics,
    read_run,
    restore_metrics,
)
from dcnseg.engine.trainer import Trainer
from dcnseg.engine.training import resume, train
from dcnseg.engine.training_data import find_training_splits, prepare_data
from dcnseg.errors import CheckpointError, ConfigError, DataError, TrainingError
from tests.conftest import SCENE_HW, small_config


class StoppedError(Exception):
    """Stands for whatever ends a run before its time."""


class StopAfter(TrainingListener):
    def __init__(self, epoch: int, step: int | None = None) -> None:
        self.epoch, self.step = epoch, step

    def step_done(self, step: Step) -> None:
        if (step.epoch, step.step) == (self.epoch, self.step):
            raise StoppedError

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        if self.step is None and record["epoch"] == self.epoch:
            raise StoppedError


def without_times(run: Path) -> list[dict[str, Any]]:
    return _without_times(read_metrics(run))


def _without_times(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if k not in ("seconds", "images_per_second")}
        for record in records
    ]


def timeless_state(run: Path) -> dict[str, Any]:
    """The resume state, without the times in its copy of metrics.jsonl."""
    state = load_resume_state(run / RESUME_STATE)
    return state | {"metrics": _without_times(map(json.loads, state["metrics"].splitlines()))}


def assert_equal_states(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal_states(left[key], right[key])
    elif isinstance(left, list | tuple):
        for one, other in zip(left, right, strict=True):
            assert_equal_states(one, other)
    else:
        assert left == right


def test_run_folder_tells_everything(run: Path, scenes: Path) -> None:
    config = json.loads((run / CONFIG).read_text())
    assert config["settings"]["model"]["encoder"] == "resnet18"
    assert config["settings"]["data"]["root"] == str(scenes)
    assert len(config["split"]["train"]) == 8
    assert config["versions"]["torch"] == torch.__version__
    records = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert 0 <= record["mean_iou"] <= 1
        assert set(record["class_iou"]) == set(read_run(run).class_map.names)
        assert len(record["offsets"]) == 3
        for statistics in record["offsets"].values():
            assert statistics["p95_px"] >= statistics["mean_px"] >= 0
            assert 0 <= statistics["outside_share"] <= 1
    _, info = load_segmenter(run / BEST_WEIGHTS)
    assert info.scores["mean_iou"] == max(record["mean_iou"] for record in records)
    assert (run / PREVIEW).stat().st_size > 1000


@pytest.mark.slow
def test_four_images_are_learned_by_heart(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "four"
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (data / split / kind).mkdir(parents=True)
            for path in sorted((scenes / "train" / kind).iterdir())[:4]:
                shutil.copy(path, data / split / kind)
    shutil.copy(scenes / "classes.json", data)
    config = small_config(data, epochs=60, lr=0.05, eval_every=60)
    config = replace(
        config,
        data=replace(
            config.data,
            crop_size=SCENE_HW,
            scale_range=(1.0, 1.0),
            flip=False,
            color_jitter=0.0,
        ),
    )
    result = train(config, tmp_path / "run")
    assert result.scores["pixel_accuracy"] > 0.95
    assert result.scores["mean_iou"] > 0.8


@pytest.mark.parametrize("step", [pytest.param(None, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"optimizer": "adamw", "accumulate": 2}])
def test_resumed_is_bit_for_bit_what_was_never_stopped(
    scenes: Path, tmp_path: Path, step: int | None, changes: dict[str, Any]
) -> None:
    config = small_config(scenes, epochs=3, **changes)
    train(config, tmp_path / "straight")
    with pytest.raises(StoppedError):
        train(config, tmp_path / "stopped", listener=StopAfter(2, step))
    resume(tmp_path / "stopped")
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "straight")
    assert_equal_states(timeless_state(tmp_path / "stopped"), timeless_state(tmp_path / "straight"))
    for name in (BEST_WEIGHTS, PREVIEW):
        stopped, straight = (tmp_path / run / name for run in ("stopped", "straight"))
        assert stopped.read_bytes() == straight.read_bytes()


def test_workers_do_not_change_the_result(scenes: Path, tmp_path: Path, run: Path) -> None:
    config = small_config(scenes, ema=0.9)
    train(replace(config, data=replace(config.data, workers=2, cache=True)), tmp_path / "run")
    assert without_times(tmp_path / "run") == without_times(run)


def test_more_epochs_can_be_asked_for(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    resume(copy, epochs=3)
    assert [record["epoch"] for record in read_metrics(copy)] == [1, 2, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "ce+dice", "class_weights": "sqrt"},
        {"loss": "focal", "class_weights": "balanced"},
        {"loss": "lovasz", "amp": "bf16"},
        {"model": ModelConfig(encoder="resnet18", decoder_channels=16, deform_layers=0)},
        {
            "model": ModelConfig(
                architecture="deeplabv3",
                encoder="resnet18",
                decoder_channels=16,
                modulated=True,
                offset_groups=2,
                output_stride=8,
            )
        },
    ],
)
def test_settings_train(scenes: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    result = train(small_config(scenes, epochs=1, **changes), tmp_path / "run")
    assert 0 <= result.scores["mean_iou"] <= 1
    load_segmenter(tmp_path / "run" / BEST_WEIGHTS)


def test_patience_stops_and_says_so(scenes: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    class Listener(TrainingListener):
        def stopped_early(self, epoch: int, patience: int) -> None:
            told.append((epoch, patience))

    # A rate this small changes nothing, so the first score stays the best.
    config = small_config(scenes, epochs=9, patience=2, lr=1e-12)
    train(config, tmp_path / "run", listener=Listener())
    last = read_metrics(tmp_path / "run")[-1]["epoch"]
    assert told == [(last, 2)]
    assert last < 9


def test_patience_counts_evaluated_epochs_only(scenes: Path, tmp_path: Path) -> None:
    config = small_config(scenes, epochs=4, eval_every=3, patience=1)
    result = train(config, tmp_path / "run")
    assert result.best_epoch in (3, 4)
    assert read_metrics(tmp_path / "run")[-1]["epoch"] == 4


def test_a_complete_run_has_nothing_to_resume(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"is complete: 2 of 2 epochs are done.*more --epochs"):
        resume(run)
    with pytest.raises(ConfigError, match="2 of 1 epochs are done"):
        resume(run, epochs=1)


def test_ignored_validation_masks_are_refused(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    for path in (data / "val" / "masks").iterdir():
        Image.new("L", (96, 64), 255).save(path)
    with pytest.raises(DataError, match="val/masks: every pixel of all 3 masks is ignored"):
        train(small_config(data), tmp_path / "run")


def test_a_longer_resume_is_remembered(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with pytest.raises(StoppedError):
        resume(copy, epochs=4, listener=StopAfter(3))
    resume(copy)
    assert [record["epoch"] for record in read_metrics(copy)] == [1, 2, 3, 4]
    config = json.loads((copy / CONFIG).read_text())
    assert config["settings"]["epochs"] == 4
    assert config["sources"]["epochs"] == "command line, at resume"


def test_a_resume_state_of_another_network_is_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    state = load_resume_state(copy / RESUME_STATE)
    del state["optimizer"]
    save_resume_state(copy / RESUME_STATE, state)
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt does not fit the run's settings: it lacks optim"
    ):
        resume(copy, epochs=3)


def test_updates_weigh_their_batches_equally(scenes: Path, tmp_path: Path) -> None:
    """Three batches in groups of two: the last update has one batch, which counts fully."""
    config = small_config(scenes, batch_size=3, accumulate=2, epochs=1)
    splits = find_training_splits(config)
    data = prepare_data(config, splits)
    trainer = Trainer(config, tmp_path, data, TrainingListener(), encoder_weights="none")
    assert [trainer._group_size(step) for step in (1, 2, 3)] == [2, 2, 1]


def test_listener_hears_of_every_step(scenes: Path, tmp_path: Path) -> None:
    heard: list[Any] = []

    class Listener(TrainingListener):
        def checking(self, done: int, total: int) -> None:
            heard.append(("check", done, total))

        def started(self, summary: RunSummary) -> None:
            heard.append(("start", summary.steps_per_epoch))

        def step_done(self, step: Step) -> None:
            heard.append(("step", step.epoch, step.step))
            assert step.seconds_left >= 0

    train(small_config(scenes, epochs=1), tmp_path / "run", listener=Listener())
    assert [entry for entry in heard if entry[0] == "check"][-1] == ("check", 13, 13)
    assert heard[-3:] == [("start", 2), ("step", 1, 1), ("step", 1, 2)]


def test_a_loss_that_stays_not_finite_is_named(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = small_config(scenes, epochs=3, lr=1e30, warmup_epochs=0, nan_patience=2)
    text = rf"2 steps in a row was not finite.*is the (weight|output).*{run / RESUME_STATE}"
    with pytest.raises(TrainingError, match=text):
        train(config, run)


def test_a_used_folder_is_refused(run: Path, scenes: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    with pytest.raises(ConfigError, match=r"is not empty.*--overwrite.*--resume"):
        train(small_config(scenes), run)
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())


def test_overwriting_leaves_foreign_files(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / METRICS).write_text("old\n")
    train(small_config(scenes, epochs=1), tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(read_metrics(tmp_path)) == 1


def test_wrong_masks_stop_before_training(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    classes = json.loads((data / "classes.json").read_text())
    classes["classes"].pop()
    (data / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(DataError, match=r"masks/.*\.png.* 4 "):
        train(small_config(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_few_images_are_counted(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    for kind in ("images", "masks"):
        for path in sorted((data / "train" / kind).iterdir())[1:]:
            path.unlink()
    with pytest.raises(DataError, match="1 images to train on and 3 to validate"):
        train(small_config(data), tmp_path / "run")


def test_changed_data_is_refused_at_resume(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    train(small_config(data, epochs=1), tmp_path / "run")
    gone = sorted((data / "train" / "images").iterdir())[0]
    gone.unlink()
    (data / "train" / "masks" / f"{gone.stem}.png").unlink()
    with pytest.raises(DataError, match=rf"train images have changed.*1 gone \({gone.stem}\)"):
        resume(tmp_path / "run", epochs=2)


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json; expected a run folder"):
        resume(tmp_path)


def test_config_is_checked_before_the_folder_is_touched(scenes: Path, tmp_path: Path) -> None:
    config: TrainConfig = small_config(scenes, model=ModelConfig(encoder="resnet19"))
    with pytest.raises(ConfigError, match="resnet19"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_epoch_with_runaway_offsets_says_so(scenes: Path, tmp_path: Path) -> None:
    warnings: list[str] = []

    class Listener(TrainingListener):
        def warned(self, text: str) -> None:
            warnings.append(text)

    config = small_config(scenes, epochs=2, offset_lr_scale=1e4, warmup_epochs=0)
    train(config, tmp_path / "run", listener=Listener())
    layers = read_metrics(tmp_path / "run")[-1]["runaway_layers"]
    assert layers
    for layer in layers:
        assert sum(warning.startswith(f"{layer}: ") for warning in warnings) == 1


def shuffle_channels(image: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    order = torch.from_numpy(np.random.permutation(3))
    return image[order] if random.random() < 0.7 else image, labels


def test_an_augmentation_of_ones_own_resumes_bit_for_bit(
    scenes: Path, tmp_path: Path, run: Path
) -> None:
    config = small_config(scenes)
    config = replace(config, data=replace(config.data, vertical_flip=True, rotate=20, blur=1))
    with_worker = replace(config, data=replace(config.data, workers=1))
    augment: Any = shuffle_channels
    train(config, tmp_path / "straight", augment=augment)
    with pytest.raises(StoppedError):
        train(with_worker, tmp_path / "stopped", augment=augment, listener=StopAfter(1, 1))
    with pytest.raises(ConfigError, match=r"the augmentation \S*shuffle_channels; none is given"):
        resume(tmp_path / "stopped")
    with pytest.raises(ConfigError, match=r"shuffle_channels; torchvision\S*ColorJitter is given"):
        resume(tmp_path / "stopped", augment=v2.ColorJitter(0.1))
    with pytest.raises(ConfigError, match="was trained without an augmentation of your own"):
        resume(run, epochs=3, augment=augment)
    resume(tmp_path / "stopped", augment=augment)
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "straight")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_augmentation_is_named(scenes: Path, tmp_path: Path, workers: int) -> None:
    def crop_image_only(image: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return image[:, 5:], labels

    config = small_config(scenes)
    config = replace(config, data=replace(config.data, workers=workers))
    augment: Any = crop_image_only
    with pytest.raises(ConfigError, match=r"crop_image_only returned .* as the label map"):
        train(config, tmp_path / "run", augment=augment)


@pytest.mark.parametrize("damage", ["deleted", "cut", "first line gone", "nonsense", "intact"])
def test_metrics_that_were_lost_are_written_again(run: Path, tmp_path: Path, damage: str) -> None:
    whole = (run / METRICS).read_text()
    first, second = whole.splitlines(keepends=True)
    left = {"cut": first + second[:9], "first line gone": second, "nonsense": "{}\n["}
    if damage != "deleted":
        (tmp_path / METRICS).write_text(left.get(damage, whole))
    saved = load_resume_state(run / RESUME_STATE)["metrics"]
    assert restore_metrics(tmp_path, 2, saved) == (whole, [])
    assert (tmp_path / METRICS).read_text() == whole


@pytest.mark.parametrize("saved", [3, b"", ["line"], "\udcff\n"])
def test_a_damaged_copy_of_the_metrics_is_an_error(tmp_path: Path, saved: Any) -> None:
    with pytest.raises(CheckpointError, match=r"last\.ckpt: its copy of metrics\.jsonl is damaged"):
        restore_metrics(tmp_path, 2, saved)


def test_a_run_whose_metrics_are_gone_ends_with_all_of_them(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / METRICS).unlink()
    resume(copy, epochs=3)
    assert (copy / METRICS).read_text().startswith((run / METRICS).read_text())
    assert [record["epoch"] for record in read_metrics(copy)] == [1, 2, 3]


def test_a_state_of_an_earlier_version_goes_on_and_tells_what_is_missing(
    run: Path, tmp_path: Path
) -> None:
    copy, told = tmp_path / "run", Recorder()
    shutil.copytree(run, copy)
    saved = load_resume_state(copy / RESUME_STATE)
    old = {name: saved[name] for name in saved if name not in ("metrics", "environment")}
    save_resume_state(copy / RESUME_STATE, old)
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    (copy / METRICS).write_text(lines[1])
    resume(copy, epochs=3, listener=told)
    assert [record["epoch"] for record in read_metrics(copy)] == [2, 3]
    (text,) = told.warnings
    assert "has no line of 1 of the epochs up to 2, epoch 1 for one" in text
    assert load_resume_state(copy / RESUME_STATE)["metrics"] == (copy / METRICS).read_text()


class Recorder(TrainingListener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warned(self, text: str) -> None:
        self.warnings.append(text)


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
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_within_the_data_is_refused(
    scenes: Path, tmp_path: Path, out: str, text: str, overwrite: bool
) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    (tmp_path / "link").symlink_to(data / "val" / "masks")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=rf"--out .* {text}"):
        train(small_config(data), data / out, overwrite=overwrite)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_folders_below_the_data_that_hold_none_of_it_are_fine(scenes: Path) -> None:
    splits = find_training_splits(small_config(scenes))
    for out in (scenes / "runs" / "a", scenes.parent / "scenes2", scenes / "train" / "images2"):
        check_out_is_separate(out, scenes, splits)


def test_images_in_deeper_folders_protect_the_folder_that_holds_these(tmp_path: Path) -> None:
    sample = Sample(tmp_path / "images/a/b/1.png", tmp_path / "masks/a/b/1_m.png", "a/b/1")
    for out in ("images/run", "images/a/run", "masks/c"):
        with pytest.raises(ConfigError, match="a folder of the data's images or masks"):
            check_out_is_separate(tmp_path / out, tmp_path, Splits(train=(sample,)))
