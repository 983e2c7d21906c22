"""Several processes, on the CPU with gloo; they train and evaluate as one process would."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcnseg.checkpoint import RESUME_STATE, load_resume_state
from dcnseg.config import ModelConfig, TrainConfig
from dcnseg.data.synthetic import write_scenes
from dcnseg.engine import distributed
from dcnseg.engine.distributed import (
    World,
    least_images,
    require_shareable_batch,
)
from dcnseg.engine.evaluation import evaluate_run
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.training import resume, train
from dcnseg.errors import ConfigError, OtherProcessError, TrainingError, TrainingStoppedError
from dcnseg.models.segmenter import build_segmenter
from dcnseg.processes import Process
from tests.conftest import small_config
from tests.engine.ranks import run_checks
from tests.engine.runs import assert_same_run

SECOND = World(Process(rank=1, size=2, local_rank=1, local_size=2))
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def shared_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training images: batches of 4 and 2, of which the second process repeats the last."""
    root = tmp_path_factory.mktemp("shared") / "scenes"
    write_scenes(root, train=6, val=3, test=0, size_hw=(64, 64), seed=1)
    return root


@pytest.fixture(scope="module")
def config(shared_scenes: Path) -> TrainConfig:
    config = small_config(shared_scenes, ema=0.9, checkpoint_minutes=1e-9)
    model = replace(config.model, deform_layers=2)
    return replace(config, data=replace(config.data, crop_size=(32, 32)), model=model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def of_two(config: TrainConfig, folder: Path) -> dict[str, list[Any]]:
    """What two processes return, by the name of the check; they start once for all tests."""
    alone = folder / "alone"
    train(replace(config, epochs=1), alone)
    checks = {
        "exchange": ("check_exchange", ()),
        "skips": ("check_skips", ()),
        "ce": ("check_updates", ("ce", 2, False)),
        "focal": ("check_updates", ("focal", 1, False)),
        "network": ("check_updates", ("ce", 1, True)),
        "straight": ("check_training", (config, folder / "straight")),
        "killed": ("check_killed", (config, folder / "killed")),
        "restarted": ("check_restarted", (config, folder / "killed")),
        "stopped": ("check_stopped", (config, folder / "stopped")),
        "evaluation": ("check_evaluation", (alone, config.data.root)),
    }
    return dict(zip(checks, run_checks(list(checks.values()), 2), strict=True))


def test_what_processes_exchange(of_two: dict[str, list[Any]]) -> None:
    for rank, result in enumerate(of_two["exchange"]):
        assert result["mean"] == [0.5, 1.0]
        assert result["any"] == [True, False]
        assert result["gather"] == ["value 0", "value 1"]
        assert result["on_main"] == 0
        assert list(result["part"]) == [[0, 2, 4], [1, 3]][rank]
        assert result["running_mean"] == [0.5, 0.5]
        expected = ["ValueError", "OtherProcessError"][rank]
        assert result["errors"] == [expected]
        assert result["explained"] == expected


@pytest.mark.parametrize("name", ["ce", "focal", "network"])
def test_20_updates_of_two_processes_are_those_of_one(
    of_two: dict[str, list[Any]], name: str
) -> None:
    for differences in of_two[name]:
        assert len(differences) == 20
        assert max(differences) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ce", "focal"])
def test_20_updates_of_four_processes_are_those_of_one(name: str) -> None:
    # Two layers: a deep network amplifies the rounding of sums in another order.
    ((*results,),) = run_checks([("check_updates", (name, 2, False))], 4)
    assert len(results) == 4
    assert max(max(differences) for differences in results) < 1e-6


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(
    of_two: dict[str, list[Any]],
) -> None:
    for outcomes in of_two["skips"]:
        assert outcomes[:3] == ["UPDATED", "SKIPPED", "UPDATED"]
        assert outcomes[3] == "a pixel of the images (rank 1)"
        assert outcomes[4] == of_two["skips"][0][4] != "nan"


def test_a_lost_process_is_named_and_a_restart_continues(
    of_two: dict[str, list[Any]], folder: Path
) -> None:
    error, killed = of_two["killed"]
    assert killed is None
    assert isinstance(error, TrainingError)
    assert str(error).startswith("Lost rank 1, process ")
    assert str(error).endswith("A run can be resumed with --resume.")
    assert of_two["restarted"] == of_two["straight"]
    assert_same_run(folder / "killed", folder / "straight")


def test_all_processes_stop_if_one_is_asked_to_and_one_process_resumes(
    of_two: dict[str, list[Any]], folder: Path
) -> None:
    assert [type(error) for error in of_two["stopped"]] == [TrainingStoppedError] * 2
    run = folder / "stopped"
    saved = load_resume_state(run / RESUME_STATE)
    assert (saved["epoch"], saved["so_far"]["step"]) == (0, 1)
    assert len(saved["other_random"]) == 1
    resume(run)
    assert [record["epoch"] for record in read_metrics(run)] == [1, 2]


def test_two_processes_evaluate_as_one(
    of_two: dict[str, list[Any]], config: TrainConfig, folder: Path
) -> None:
    expected = evaluate_run(folder / "alone", config.data.root, "all", device="cpu")
    for scores in of_two["evaluation"]:
        assert scores.to_detailed_dict() == expected.to_detailed_dict()
        assert [image.name for image in scores.images] == [i.name for i in expected.images]
        assert (scores.image_counts == expected.image_counts).all()


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one(config: TrainConfig, folder: Path) -> None:
    run = folder / "longer"
    train(replace(config, epochs=1), run)
    first = read_metrics(run)
    (results,) = run_checks([("check_resumed", (run, 2))], 2)
    assert results[0] == results[1]
    records = read_metrics(run)
    assert records[:1] == first
    assert [record["epoch"] for record in records] == [1, 2]


def test_a_batch_that_cannot_be_shared() -> None:
    require_shareable_batch(3, 1, 2)
    require_shareable_batch(8, 4, 2)
    with pytest.raises(ConfigError, match="--batch-size is 6, which 4 processes cannot share eq"):
        require_shareable_batch(6, 4, 1)
    with pytest.raises(
        ConfigError, match=r"--batch-size is 4 for 4 processes; .* Use at least 8, or at most 2 p"
    ):
        require_shareable_batch(4, 4, 2)
    assert (least_images(CUDA), least_images(torch.device("cpu"))) == (1, 2)


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    SECOND.claim_device("cpu")
    for name, message in (("mps", "--device is mps, which selects mps"), ("cuda:1", "of its own")):
        monkeypatch.setattr(distributed, "select_device", torch.device)
        with pytest.raises(ConfigError, match=message):
            SECOND.claim_device(name)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes on this machine, but PyTorch finds 1 GPUs"):
        SECOND.claim_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    SECOND.claim_device("cuda")
    assert chosen == [1]


def test_batch_norm_of_timm_keeps_its_activation_when_it_is_synchronized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ModelConfig(encoder="tu-regnetx_002", decoder_channels=16, deform_layers=0)
    model = build_segmenter(config, 2).eval()
    image = torch.randn(1, 3, 64, 64)
    before = model(image)
    assert SECOND.synchronize_batch_norm(model) is model  # on the CPU
    monkeypatch.setattr(distributed, "_is_on_gpu", lambda _model: True)
    converted = SECOND.synchronize_batch_norm(model)
    kinds = {type(module) for module in converted.modules()}
    assert any(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    assert not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    assert torch.equal(converted(image), before)
    converted.train()  # other processes have images, too
    assert converted._has_synchronized_batch_norm()


def test_unused_parameters_are_found() -> None:
    config = ModelConfig(encoder="resnet18", decoder_channels=16, deform_layers=2)
    model = build_segmenter(config, 2)
    assert not distributed._has_unused_parameters(model)
    model.encoder.unused = nn.Linear(1, 1)
    assert distributed._has_unused_parameters(model)
    assert model.training


def test_errors_of_all_processes_are_explained_by_the_main_one() -> None:
    error = TrainingError("why")
    assert World().explain(error) is error
    assert isinstance(SECOND.explain(error), OtherProcessError)


def test_a_restart_does_not_touch_the_run_of_another_job(
    run: Path, tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(ConfigError, match="is not empty"):
        train(config, copy)
