from __future__ import annotations

import pytest
import torch

from dcnseg.config import ModelConfig
from dcnseg.engine.optim import build_optimizer, build_schedule, parameter_groups
from dcnseg.models.segmenter import build_segmenter
from dcnseg.ops import DeformPSRoIPool, DeformRoIPool


def test_offset_branches_have_their_own_rate() -> None:
    model = build_segmenter(ModelConfig(encoder="resnet18", decoder_channels=16), 3)
    groups = parameter_groups(model, lr=0.5, offset_lr_scale=0.1, weight_decay=1e-3)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}  # type: ignore[attr-defined]
    assert len(rate) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_offset = ".conv_offset." in name
        assert rate[id(parameter)] == pytest.approx(0.05 if is_offset else 0.5), name
        assert decay[id(parameter)] == (1e-3 if parameter.dim() > 1 else 0), name


def test_offset_branches_of_the_roi_poolings_have_the_rate_of_offsets() -> None:
    parts = {
        "plain": torch.nn.Linear(2, 2),
        "pool": DeformRoIPool(1, 1.0, 1, hidden_channels=2),
        "sensitive": DeformPSRoIPool(1, 1.0, 1),
    }
    # A layer may be the whole model: no dot stands before the name of its branch then.
    for model in (torch.nn.ModuleDict(parts), *parts.values()):
        groups = parameter_groups(model, lr=1.0, offset_lr_scale=0.1, weight_decay=0)
        rate = {id(p): g["lr"] for g in groups for p in g["params"]}  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters():
            is_offset = "offset_branch" in name
            assert rate[id(parameter)] == pytest.approx(0.1 if is_offset else 1.0), name


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_schedule_warms_up_and_falls_to_zero(name: str) -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(layer, name, lr=1.0, offset_lr_scale=0.1, weight_decay=0)
    schedule = build_schedule(optimizer, total_steps=100, warmup_steps=9, power=0.9)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx((1 - 9 / 100) ** 0.9)
    assert rates[50] == pytest.approx(0.5**0.9)
    assert optimizer.param_groups[0]["lr"] == 0


def test_warm_up_longer_than_training_still_moves() -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(layer, "sgd", lr=1.0, offset_lr_scale=1, weight_decay=0)
    build_schedule(optimizer, total_steps=1, warmup_steps=50, power=0.9)
    assert optimizer.param_groups[0]["lr"] == 1
