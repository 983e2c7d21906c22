from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcnseg.checkpoint import RESUME_STATE, load_resume_state
from dcnseg.engine import trainer as trainer_module
from dcnseg.engine.loading import BatchGroup
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.state import TrainingState
from dcnseg.engine.step import StepOutcome, TrainingStep
from dcnseg.engine.training import train
from dcnseg.errors import TrainingError
from tests.conftest import small_config
from tests.engine.runs import CPU, assert_equal, tiny_state


class NonFiniteLoss:
    """A loss that is not finite, or has no finite gradient, in some batches (from 1)."""

    def __init__(self, batches: set[int], *, in_gradient: bool) -> None:
        self.batches, self.in_gradient = batches, in_gradient
        self.batch = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.batch += 1
        if self.batch not in self.batches:
            return logits.square().mean()
        if self.in_gradient:
            return (logits * 0).abs().sqrt().sum()  # 0, with an infinite slope
        return logits.mean() * math.nan


def random_group(size: int = 1) -> BatchGroup:
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    return BatchGroup(size, [(torch.randn(2, 3, 4, 4), labels) for _ in range(size)])


def float32_state() -> TrainingState:
    state = tiny_state()
    state.scaler = torch.amp.GradScaler("cpu", enabled=False)
    return state


def parts_of(state: TrainingState) -> list[Any]:
    assert state.average is not None
    parts: list[Any] = [state.model, state.average, state.optimizer, state.schedule]
    return [copy.deepcopy(part.state_dict()) for part in parts]


def test_a_group_has_the_mean_gradient_of_its_batches() -> None:
    group = random_group(3)
    states = float32_state(), float32_state()
    for state in states:
        state.model.eval()  # batch statistics would differ
    whole = [torch.cat(tensors) for tensors in zip(*group.batches, strict=True)]
    losses: list[tuple[int, float]] = []
    loss = NonFiniteLoss(set(), in_gradient=False)
    step = TrainingStep(states[0], loss, CPU, None)
    assert step(group, lambda *values: losses.append(values)) is StepOutcome.UPDATED
    TrainingStep(states[1], loss, CPU, None)(BatchGroup(1, [(whole[0], whole[1])]))
    assert [size for size, _ in losses] == [2, 2, 2]
    for one, other in zip(*(state.model.parameters() for state in states), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(in_gradient: bool) -> None:
    state = float32_state()
    step = TrainingStep(state, NonFiniteLoss({2, 4}, in_gradient=in_gradient), CPU, None)
    assert step(random_group()) is StepOutcome.UPDATED
    before = parts_of(state)
    assert step(random_group()) is StepOutcome.SKIPPED
    assert step(random_group(2)) is StepOutcome.SKIPPED
    assert_equal(parts_of(state), before)


def test_an_overflow_of_float16_differs_from_a_non_finite_loss() -> None:
    state = tiny_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    step = TrainingStep(state, NonFiniteLoss({1, 2}, in_gradient=True), CPU, None)
    outcomes = [step(random_group()) for _ in range(2)]
    assert outcomes == [StepOutcome.OVERFLOWED, StepOutcome.SKIPPED]  # the scale is 1 now


def test_the_first_non_finite_tensor_is_found() -> None:
    state = float32_state()
    step = TrainingStep(state, NonFiniteLoss(set(), in_gradient=False), CPU, None)
    ((images, labels),) = random_group().batches
    step(BatchGroup(1, [(images, labels)]))
    assert step.find_non_finite() == "the norm of the gradient; all its elements are finite"
    step._loss = NonFiniteLoss({1}, in_gradient=True)
    assert step.find_non_finite() == "the gradient of 1.bias"
    step._loss = NonFiniteLoss({1}, in_gradient=False)
    assert step.find_non_finite() == "the loss; all layer outputs are finite"
    images[1, 2, 3, 3] = math.nan
    assert step.find_non_finite() == "a pixel of the images"
    layer = state.model.get_submodule("0")
    with torch.no_grad():
        next(layer.parameters())[0, 0, 0, 0] = math.inf
        assert step.find_non_finite() == "the weight 0.weight"
        next(layer.parameters())[0, 0, 0, 0] = 0
    images[1, 2, 3, 3] = 0
    layer.register_forward_hook(lambda _layer, _inputs, output: output * math.inf)
    assert step.find_non_finite() == "the output of the layer 0"


def test_skipped_steps_are_counted_and_finally_stop_the_run(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    loss = NonFiniteLoss({2, 3, 5, 6, 7, 8}, in_gradient=False)
    monkeypatch.setattr(trainer_module, "build_loss", lambda name, weights: loss)
    config = small_config(scenes, batch_size=2, nan_patience=3, epochs=3)
    text = (
        r"of 3 steps in a row was not finite, up to step 3 of epoch 2\. The first non-finite value "
        rf"is in the loss.*last good checkpoint is {run / RESUME_STATE}"
    )
    with pytest.raises(TrainingError, match=text):
        train(config, run)
    assert [record["skipped_steps"] for record in read_metrics(run)] == [2]
    saved = load_resume_state(run / RESUME_STATE)
    assert saved["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in saved["model"].values())
