from __future__ import annotations

import math

import pytest
import torch

from dcnseg.config import ModelConfig
from dcnseg.engine.offset_monitor import OffsetMonitor
from dcnseg.models.segmenter import Segmenter, build_segmenter


@pytest.fixture
def model() -> Segmenter:
    config = ModelConfig(encoder="resnet18", decoder_channels=16, deform_layers=2)
    return build_segmenter(config, 3).eval()


def record(model: Segmenter) -> dict[str, dict[str, float | None]]:
    with OffsetMonitor(model) as monitor, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    return monitor.summary()


def test_statistics_of_a_constant_offset(model: Segmenter) -> None:
    first, second = model.deformable_layers().items()
    assert first[1].conv_offset.bias is not None
    with torch.no_grad():
        first[1].conv_offset.bias[0::2] = 3.0  # dy of every tap
        first[1].conv_offset.bias[1::2] = 4.0  # dx
    summary = record(model)
    assert summary[first[0]]["mean_px"] == summary[first[0]]["p95_px"] == 5.0
    assert summary[second[0]]["mean_px"] == 0.0
    assert summary[second[0]]["outside_share"] == summary[second[0]]["grid_outside_share"]


def test_non_finite_statistics_are_none(model: Segmenter) -> None:
    name, layer = next(iter(model.deformable_layers().items()))
    assert layer.conv_offset.bias is not None
    with torch.no_grad():
        layer.conv_offset.bias[0] = math.nan
    assert record(model)[name]["mean_px"] is None


def test_hooks_are_removed(model: Segmenter) -> None:
    record(model)
    for layer in model.deformable_layers().values():
        assert not layer.conv_offset._forward_hooks


@pytest.mark.parametrize("value", [1e5, -1e30, math.nan, math.inf])
def test_large_offsets_give_a_warning(model: Segmenter, value: float) -> None:
    (first, layer), (second, _) = model.deformable_layers().items()
    with OffsetMonitor(model) as monitor, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert monitor.runaways() == {}
    assert layer.conv_offset.bias is not None
    with torch.no_grad():
        layer.conv_offset.bias.fill_(value)
    with OffsetMonitor(model) as monitor, torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    warning = monitor.runaways()[first]
    assert warning.startswith(f"{first}: ")
    assert "lower --offset-lr-scale or --lr" in warning
    assert second in monitor.runaways() or math.isfinite(value)
