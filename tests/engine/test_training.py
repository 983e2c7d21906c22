from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

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
from dcnseg.config import ModelConfig
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import CONFIG, METRICS, PREVIEW, read_run
from dcnseg.engine.training import resume, train
from dcnseg.engine.training_data import (
    check_files_are_unchanged,
    find_training_splits,
    write_fingerprints,
)
from dcnseg.errors import ConfigError, DataError
from tests.conftest import SCENE_HW, small_config
from tests.engine.runs import (
    KillAfter,
    KilledError,
    Recorder,
    assert_same_run,
    make_trainer,
    timeless,
)


def test_contents_of_the_run_folder(run: Path, scenes: Path) -> None:
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
def test_four_images_are_overfitted(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "four"
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (data / split / kind).mkdir(parents=True)
            for path in sorted((scenes / "train" / kind).iterdir())[:4]:
                shutil.copy(path, data / split / kind)
    shutil.copy(scenes / "classes.json", data)
    model = ModelConfig(encoder="resnet18", encoder_depth=3, architecture="plain")
    config = small_config(data, model=model, optimizer="adamw", lr=2e-3, epochs=100, eval_every=50)
    fixed = {"scale_range": (1.0, 1.0), "flip": False, "color_jitter": 0.0}
    config = replace(config, data=replace(config.data, crop_size=SCENE_HW, **fixed))  # type: ignore[arg-type]
    result = train(config, tmp_path / "run")
    assert result.scores["pixel_accuracy"] > 0.95
    assert result.scores["mean_iou"] > 0.8


def test_resumed_within_a_group_of_batches_equals_uninterrupted(
    scenes: Path, tmp_path: Path
) -> None:
    changes = {"batch_size": 2, "accumulate": 3, "checkpoint_minutes": 1e-9, "epochs": 1}
    config = small_config(scenes, optimizer="adamw", **changes)
    train(config, tmp_path / "straight")
    for step in (3, 4):  # of groups of 3 and 1 batches; a save follows each group
        killed = tmp_path / f"killed{step}"
        with pytest.raises(KilledError):
            train(config, killed, listener=KillAfter(1, step))
        partial = load_resume_state(killed / RESUME_STATE)["so_far"]
        assert (partial and partial["step"]) == (None if step == 3 else 3)
        resume(killed)
        assert_same_run(killed, tmp_path / "straight")


SMALL_MODEL: dict[str, Any] = {"encoder": "resnet18", "decoder_channels": 16}
V2_MODEL = {"architecture": "deeplabv3", "modulated": True, "offset_groups": 2, "output_stride": 8}


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({"loss": "lovasz", "class_weights": "sqrt", "amp": "bf16"}, {}),
        ({"loss": "focal", "class_weights": "balanced"}, {"deform_layers": 0}),
        ({"loss": "ce+dice"}, V2_MODEL),
    ],
)
def test_settings_train(
    scenes: Path, tmp_path: Path, changes: dict[str, Any], model: dict[str, Any]
) -> None:
    config = small_config(scenes, epochs=1, model=ModelConfig(**(SMALL_MODEL | model)), **changes)
    result = train(config, tmp_path / "run")
    assert 0 <= result.scores["mean_iou"] <= 1
    load_segmenter(tmp_path / "run" / BEST_WEIGHTS)


def test_listener_events_of_a_run_that_stops_early_and_overwrites_another(
    scenes: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / METRICS).write_text("old\n")
    listener = MagicMock(wraps=TrainingListener())
    # This learning rate changes nothing, so the first score remains the best.
    config = small_config(scenes, epochs=9, patience=1, lr=1e-30, seed=2)
    train(config, tmp_path, overwrite=True, listener=listener)
    events = [name for name, *_ in listener.mock_calls if name.endswith(("started", "_done"))]
    assert events == ["started", *["step_done", "step_done", "epoch_done"] * 2]
    assert listener.checking.call_args.args == (13, 13)
    steps = [call.args[0] for call in listener.step_done.mock_calls]
    assert [(step.epoch, step.step) for step in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(step.seconds_left >= 0 for step in steps)
    assert [call.kwargs["is_best"] for call in listener.epoch_done.mock_calls] == [True, False]
    listener.stopped_early.assert_called_once_with(2, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [record["epoch"] for record in read_metrics(tmp_path)] == [1, 2]
    with pytest.raises(ConfigError, match="at epoch 2, after 1 epochs without improvement"):
        resume(tmp_path)


def test_patience_counts_at_evaluated_epochs_only(scenes: Path, tmp_path: Path) -> None:
    trainer = make_trainer(small_config(scenes, epochs=5, eval_every=3, patience=1), tmp_path)
    stops = []
    for epoch in range(1, 6):
        trainer.state.epoch = epoch
        stops.append(trainer.should_stop_early())
    assert stops == [False, False, True, False, True]


def test_a_complete_run_cannot_be_resumed(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"is complete: 2 of 2 epochs are done.*set --epochs to"):
        resume(run)
    with pytest.raises(ConfigError, match="2 of 1 epochs are done"):
        resume(run, epochs=1)


def test_more_epochs_are_saved_and_lost_metrics_restored(run: Path, run_copy: Path) -> None:
    (run_copy / METRICS).unlink()
    with pytest.raises(KilledError):
        resume(run_copy, epochs=4, listener=KillAfter(3))
    resume(run_copy)
    assert (run_copy / METRICS).read_text().startswith((run / METRICS).read_text())
    assert [record["epoch"] for record in read_metrics(run_copy)] == [1, 2, 3, 4]
    config = json.loads((run_copy / CONFIG).read_text())
    assert config["settings"]["epochs"] == 4
    assert config["sources"]["epochs"] == "command line, at resume"


def test_checkpoint_of_an_early_version_resumes_and_missing_epochs_are_reported(
    run: Path, run_copy: Path
) -> None:
    saved = load_resume_state(run_copy / RESUME_STATE)
    old = {name: saved[name] for name in saved if name not in ("metrics", "environment")}
    save_resume_state(run_copy / RESUME_STATE, old)
    (run_copy / METRICS).write_text((run / METRICS).read_text().splitlines(keepends=True)[1])
    listener = Recorder()
    resume(run_copy, epochs=3, listener=listener)
    assert [record["epoch"] for record in read_metrics(run_copy)] == [2, 3]
    (text,) = listener.warnings
    assert "lack 1 of the epochs up to 2, such as epoch 1" in text
    assert load_resume_state(run_copy / RESUME_STATE)["metrics"] == (run_copy / METRICS).read_text()


def test_edited_settings_are_refused(run: Path, run_copy: Path) -> None:
    record = json.loads((run_copy / CONFIG).read_text())
    record["settings"] |= {"lr": 0.5, "epochs": 4}
    record["settings"]["model"]["modulated"] = True
    (run_copy / CONFIG).write_text(json.dumps(record))
    text = r"model.modulated is True, was False; .*lr is 0.5, was 0.02"
    with pytest.raises(ConfigError, match=text):
        resume(run_copy)
    with pytest.raises(ConfigError, match="lr cannot be changed when a run is resumed"):
        resume(run, changes={"lr": 1.0})


def test_changed_data_is_refused(run_copy: Path, data_copy: Path) -> None:
    config = json.loads((run_copy / CONFIG).read_text())
    config["settings"]["data"]["root"] = str(data_copy)
    (run_copy / CONFIG).write_text(json.dumps(config))
    stem = min((data_copy / "train" / "images").iterdir()).stem
    for path in data_copy.glob(f"train/*/{stem}.*"):
        path.unlink()
    with pytest.raises(DataError, match=rf"train images have changed.*1 missing \({stem}\)"):
        resume(run_copy, epochs=3)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_replaced_files_are_detected(data_copy: Path, tmp_path: Path, kind: str) -> None:
    splits = find_training_splits(small_config(data_copy))
    write_fingerprints(tmp_path, splits)
    check_files_are_unchanged(tmp_path, splits)
    first, second = sorted((data_copy / "val" / kind).iterdir())[:2]
    shutil.copy(first, second)
    text = rf"{second.name}: has changed since the run started \(.*\)\. Restore it"
    with pytest.raises(DataError, match=text):
        check_files_are_unchanged(tmp_path, splits)


def test_invalid_data_and_settings_stop_before_the_folder_is_written(
    data_copy: Path, tmp_path: Path
) -> None:
    run, class_list = tmp_path / "run", data_copy / "classes.json"
    with pytest.raises(ConfigError, match="resnet19"):
        train(small_config(data_copy, model=ModelConfig(encoder="resnet19")), run)
    before = class_list.read_text()
    classes = json.loads(before)
    del classes["classes"][-1]
    class_list.write_text(json.dumps(classes))
    with pytest.raises(DataError, match=r"masks/.*\.png.* 3 "):
        train(small_config(data_copy), run)
    class_list.write_text(before)
    for path in (data_copy / "val" / "masks").iterdir():
        Image.new("L", (96, 64), 255).save(path)
    with pytest.raises(DataError, match="val/masks: every pixel of all 3 masks is ignored"):
        train(small_config(data_copy), run)
    for kind in ("images", "masks"):
        for path in sorted((data_copy / "train" / kind).iterdir())[1:]:
            path.unlink()
    with pytest.raises(DataError, match="1 image/mask pairs for training and 3 for validation"):
        train(small_config(data_copy), run)
    assert not run.exists()


def shuffle_channels(image: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    order = torch.from_numpy(np.random.permutation(3))
    return image[order] if random.random() < 0.7 else image, labels


def test_resumed_with_a_custom_augmentation_equals_uninterrupted(
    scenes: Path, tmp_path: Path, run: Path
) -> None:
    config = small_config(scenes, epochs=1, checkpoint_minutes=1e-9)
    config = replace(config, data=replace(config.data, vertical_flip=True, rotate=20, blur=1))
    with_worker = replace(config, data=replace(config.data, workers=2, cache=True))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    augment: Any = shuffle_channels
    train(config, straight, augment=augment)
    with pytest.raises(KilledError):
        train(with_worker, killed, augment=augment, listener=KillAfter(1, 2))
    with pytest.raises(ConfigError, match=r"the augmentation \S*shuffle_channels, but .* None"):
        resume(killed)
    with pytest.raises(ConfigError, match=r"shuffle_channels, but `augment` is \S*ColorJitter"):
        resume(killed, augment=v2.ColorJitter(0.1))
    with pytest.raises(ConfigError, match="was trained without a custom augmentation"):
        resume(run, epochs=3, augment=augment)
    resume(killed, augment=augment)
    assert timeless(read_metrics(killed)) == timeless(read_metrics(straight))
