from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcnseg.checkpoint import BEST_WEIGHTS
from dcnseg.config import ModelConfig
from dcnseg.engine import epoch_evaluation
from dcnseg.engine.epoch_evaluation import OffsetMonitor
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.training import train
from dcnseg.errors import NotFiniteError, TrainingError
from dcnseg.models.segmenter import Segmenter, build_segmenter
from dcnseg.scoring.scores import Scores
from tests.conftest import small_config
from tests.engine.runs import Recorder, make_trainer


def fail_with(error: Exception) -> Callable[..., Scores]:
    def evaluate(*_arguments: Any, **_options: Any) -> Scores:
        raise error

    return evaluate


def test_an_epoch_with_non_finite_output_has_no_score(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(small_config(scenes), tmp_path, listener := Recorder())
    with monkeypatch.context() as patch:
        patch.setattr(epoch_evaluation, "evaluate", fail_with(NotFiniteError("a.png: bad")))
        assert trainer.evaluator.evaluate(1, lambda: None) == {"mean_iou": None}
    assert listener.warnings == ["Epoch 1 has no score. a.png: bad"]
    assert not (tmp_path / BEST_WEIGHTS).exists()
    assert trainer.evaluator.evaluate(2, lambda: None)["mean_iou"] >= 0
    assert trainer.state.best_epoch == 2
    assert (tmp_path / BEST_WEIGHTS).exists()


def test_a_run_without_any_score_is_an_error(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epoch_evaluation, "evaluate", fail_with(NotFiniteError("a.png: bad")))
    with pytest.raises(TrainingError, match=r"No epoch of .* has a score: the network's output"):
        train(small_config(scenes, epochs=1), tmp_path)
    assert [record["mean_iou"] for record in read_metrics(tmp_path)] == [None]


def test_out_of_memory_is_explained(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(small_config(scenes), tmp_path)
    monkeypatch.setattr(epoch_evaluation, "evaluate", fail_with(torch.OutOfMemoryError()))
    text = r"Out of memory on cpu for a validation image in windows of 1024 .* last checkpoint is "
    with pytest.raises(TrainingError, match=text):
        trainer.evaluator.evaluate(1, lambda: None)


def test_large_offsets_are_recorded_each_epoch_and_reported_once(
    scenes: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(small_config(scenes), tmp_path, listener := Recorder())
    name, layer = next(iter(trainer.state.model.deformable_layers().items()))
    assert layer.conv_offset.bias is not None
    with torch.no_grad():
        layer.conv_offset.bias += 30.0
    for epoch in (1, 2):
        assert trainer.evaluator.evaluate(epoch, lambda: None)["runaway_layers"] == [name]
    (text,) = listener.warnings
    assert text.startswith(f"{name}: the 95th percentile of the offsets is 42 px, but the longer")
    assert "feature map is only 6 px." in text  # for images of 64x96


@pytest.fixture
def model() -> Segmenter:
    config = ModelConfig(encoder="resnet18", decoder_channels=16, deform_layers=2)
    return build_segmenter(config, 3).eval()


def record(model: Segmenter) -> OffsetMonitor:
    with OffsetMonitor(model) as monitor, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    for layer in model.deformable_layers().values():
        assert not layer.conv_offset._forward_hooks
    return monitor


def test_statistics_of_a_constant_offset(model: Segmenter) -> None:
    first, second = model.deformable_layers().items()
    assert first[1].conv_offset.bias is not None
    with torch.no_grad():
        first[1].conv_offset.bias[0::2] = 3.0  # dy of every tap
        first[1].conv_offset.bias[1::2] = 4.0  # dx
    summary = record(model).summary()
    assert summary[first[0]]["mean_px"] == summary[first[0]]["p95_px"] == 5.0
    assert summary[second[0]]["mean_px"] == 0.0
    assert summary[second[0]]["outside_share"] == summary[second[0]]["grid_outside_share"]


@pytest.mark.parametrize("value", [1e5, -1e30, math.nan, math.inf])
def test_large_offsets_give_a_warning(model: Segmenter, value: float) -> None:
    (first, layer), (second, _) = model.deformable_layers().items()
    assert record(model).runaways() == {}
    assert layer.conv_offset.bias is not None
    with torch.no_grad():
        layer.conv_offset.bias.fill_(value)
    monitor = record(model)
    warning = monitor.runaways()[first]
    assert warning.startswith(f"{first}: ")
    assert "lower --offset-lr-scale or --lr" in warning
    assert second in monitor.runaways() or math.isfinite(value)
    assert math.isfinite(value) or monitor.summary()[first]["mean_px"] is None
