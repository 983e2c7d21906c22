"""Listeners that stop or record a run, and comparisons of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dcnseg.checkpoint import BEST_WEIGHTS, RESUME_STATE, load_resume_state
from dcnseg.config import Preprocessing, TrainConfig
from dcnseg.engine.listener import PartialEpoch, Step, TrainingListener
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.optim import build_optimizer, build_schedule
from dcnseg.engine.run_folder import PREVIEW
from dcnseg.engine.state import TrainingState, build_average
from dcnseg.engine.trainer import Trainer
from dcnseg.engine.training_data import find_training_splits, prepare_data
from dcnseg.models.segmenter import Segmenter

CPU = torch.device("cpu")


class KilledError(Exception):
    """Ends a run without notice, as a killed process does."""


class KillAfter(TrainingListener):
    """Ends a run after a step, or after an epoch."""

    def __init__(self, epoch: int, step: int | None = None) -> None:
        self.epoch, self.step = epoch, step

    def step_done(self, step: Step) -> None:
        if (step.epoch, step.step) == (self.epoch, self.step):
            raise KilledError

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        if self.step is None and record["epoch"] == self.epoch:
            raise KilledError


class Recorder(TrainingListener):
    """Records notes and warnings; optionally requests a stop at the n-th question."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.stop_at = stop_at

    def noted(self, text: str) -> None:
        self.notes.append(text)

    def warned(self, text: str) -> None:
        self.warnings.append(text)

    def stop_requested(self) -> bool:
        self.stop_at = self.stop_at and self.stop_at - 1
        return self.stop_at == 0


def make_trainer(
    config: TrainConfig, run: Path, listener: TrainingListener | None = None
) -> Trainer:
    data = prepare_data(config, find_training_splits(config))
    return Trainer(config, run, data, listener or TrainingListener(), encoder_weights="none")


def tiny_state(optimizer: str = "sgd") -> TrainingState:
    """A state whose network has two layers, after one step."""
    torch.manual_seed(0)
    model = cast(Segmenter, nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)))
    built = build_optimizer(model, optimizer, lr=0.1, offset_lr=0.01, weight_decay=0.1)
    state = TrainingState(
        model=model,
        average=build_average(model, 0.9),
        optimizer=built,
        schedule=build_schedule(built, total_steps=9, warmup_steps=1, power=0.9),
        scaler=torch.amp.GradScaler("cpu"),
        preprocessing=Preprocessing(),
        partial=PartialEpoch(lr=0.1, step=1),
        best_scores={"mean_iou": 0.5},
    )
    take_step(state)
    return state


def take_step(state: TrainingState) -> None:
    state.model(torch.randn(2, 3, 4, 4)).sum().backward()
    state.optimizer.step()
    state.schedule.step()


def assert_same_run(left: Path, right: Path) -> None:
    """Compare metrics, checkpoints, best weights and previews bit by bit, except for times."""
    assert timeless(read_metrics(left)) == timeless(read_metrics(right))
    assert_equal(_timeless_state(left), _timeless_state(right))
    for name in (BEST_WEIGHTS, PREVIEW):
        assert (left / name).read_bytes() == (right / name).read_bytes()


def timeless(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def _timeless_state(run: Path) -> dict[str, Any]:
    state = load_resume_state(run / RESUME_STATE)
    return state | {"metrics": timeless(map(json.loads, state["metrics"].splitlines()))}


def assert_equal(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right
