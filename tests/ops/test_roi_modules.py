from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnseg.errors import ConfigError, ShapeError
from dcnseg.ops import (
    ROI_OFFSET_BRANCH,
    DeformPSRoIPool,
    DeformRoIPool,
    PSRoIPool,
    RoIAvgPool,
    RoIPool,
    deform_ps_roi_pool,
    deform_roi_pool,
    ps_roi_pool,
    roi_avg_pool,
    roi_pool,
)
from dcnseg.ops.roi.checks import Mode

# Without native operators, "auto" warns once per process.
pytestmark = pytest.mark.filterwarnings("ignore:dcnseg uses the slower:RuntimeWarning")

BOXES = torch.tensor([[0, 1.0, 2, 13, 9], [1, -4, 0, 9, 20], [1, 4, 4, 15, 15]])


def make_map(channels: int = 12) -> Tensor:
    return torch.randn(2, channels, 8, 9)


def test_modules_without_offsets_equal_the_functions() -> None:
    input = make_map()
    torch.testing.assert_close(
        RoIPool((2, 3), 0.5)(input, BOXES), roi_pool(input, BOXES, (2, 3), 0.5)
    )
    torch.testing.assert_close(
        RoIAvgPool((2, 3), 0.5)(input, BOXES), roi_avg_pool(input, BOXES, (2, 3), 0.5)
    )
    torch.testing.assert_close(
        PSRoIPool((2, 3), 0.5, corners="rfcn")(input, BOXES),
        ps_roi_pool(input, BOXES, (2, 3), 0.5, corners="rfcn"),
    )


def test_modules_show_their_arguments() -> None:
    assert repr(RoIPool(7, 0.0625)) == "RoIPool(output_size=(7, 7), spatial_scale=0.0625)"
    assert repr(RoIAvgPool(7)) == "RoIAvgPool(output_size=(7, 7), spatial_scale=1)"
    assert "corners=torchvision" in repr(PSRoIPool(7))
    assert "gamma=0.1, mode=mmcv, sampling_ratio=2" in repr(
        DeformRoIPool(2, 1.0, 1, hidden_channels=4, mode="mmcv", sampling_ratio=2)
    )
    text = repr(DeformPSRoIPool((2, 3), 1.0, 4, classes=2, part_size=1))
    assert "classes=2, gamma=0.1, group_size=(2, 3), part_size=(1, 1), samples_per_part=4" in text


@pytest.mark.parametrize("mode", ["paper", "mmcv", "mxnet"])
def test_deformable_module_initially_pools_without_offsets(mode: Mode) -> None:
    input = make_map()
    layer = DeformRoIPool((2, 3), 0.5, 12, hidden_channels=8, mode=mode)
    expected = deform_roi_pool(input, BOXES, None, (2, 3), 0.5, mode=mode)
    torch.testing.assert_close(layer(input, BOXES), expected)
    if mode != "mmcv":
        sensitive = DeformPSRoIPool((2, 3), 0.5, 12, mode=mode)
        expected = deform_ps_roi_pool(input, BOXES, None, (2, 3), 0.5, mode=mode)
        torch.testing.assert_close(sensitive(input, BOXES), expected)


def test_deformable_module_uses_the_predicted_offsets() -> None:
    input = make_map()
    layer = DeformRoIPool((2, 3), 0.5, 12, hidden_channels=8, gamma=0.2)
    nn.init.normal_(layer.offset_branch[4].weight)  # type: ignore[arg-type]
    offset = layer.predict_offset(input, BOXES)
    expected = layer.offset_branch(roi_avg_pool(input, BOXES, (2, 3), 0.5).flatten(1))
    torch.testing.assert_close(offset, expected.view(3, 2, 2, 3))
    torch.testing.assert_close(
        layer(input, BOXES), deform_roi_pool(input, BOXES, offset, (2, 3), 0.5, 0.2)
    )


def test_position_sensitive_module_pools_offset_maps_of_the_features() -> None:
    input, features = make_map(12), make_map(5)
    layer = DeformPSRoIPool((2, 3), 0.5, 5, classes=2, kernel_size=3, part_size=(2, 1))
    nn.init.normal_(layer.offset_branch.weight)
    offset = layer.predict_offset(features, BOXES)
    assert offset.shape == (3, 4, 2, 1)
    offset_maps = layer.offset_branch(features)
    assert offset_maps.shape == (2, 8, 8, 9)
    torch.testing.assert_close(
        offset, deform_ps_roi_pool(offset_maps, BOXES, None, (2, 1), 0.5, mode="paper")
    )
    torch.testing.assert_close(
        layer(input, BOXES, features),
        deform_ps_roi_pool(input, BOXES, offset, (2, 3), 0.5, part_size=(2, 1)),
    )


LAYERS: list[Any] = [
    lambda: DeformRoIPool((2, 3), 0.5, 12, hidden_channels=8),
    lambda: DeformPSRoIPool((2, 3), 0.5, 12),
]


@pytest.mark.parametrize("make", LAYERS)
def test_all_parameters_get_gradients(make: Any) -> None:
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    input = make_map()
    for _ in range(2):  # the last layer is zero at first, so the others get gradients a step later
        optimizer.zero_grad()
        layer(input, BOXES).square().sum().backward()
        optimizer.step()
    for name, parameter in layer.named_parameters():
        assert ROI_OFFSET_BRANCH in f".{name}"
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("make", LAYERS)
def test_works_under_autocast_and_copies(make: Any) -> None:
    layer = copy.deepcopy(make())
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(make_map(), BOXES)
        low = layer(make_map().bfloat16(), BOXES)
    assert output.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    (output.sum() + low.float().sum()).backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("make", [lambda: RoIPool(2), lambda: RoIAvgPool(2), *LAYERS])
def test_backend_attribute_is_used(make: Any) -> None:
    layer = make()
    layer.backend = "none"
    with pytest.raises(ConfigError, match="`backend` is 'none'"):
        layer(make_map(), BOXES)


COUNT = "expected an integer of at least 1"


@pytest.mark.parametrize(
    ("make", "name", "value", "error", "message"),
    [
        (partial(RoIAvgPool, 1), "spatial_scale", -1, ConfigError, "expected a number above 0"),
        (RoIPool, "output_size", 0, ShapeError, "expected one or two integers"),
        (partial(PSRoIPool, 1), "corners", "none", ConfigError, "expected"),
        (partial(DeformRoIPool, 1, 1.0), "in_channels", 0, ConfigError, COUNT),
        (partial(DeformRoIPool, 1, 1.0, 1), "mode", "none", ConfigError, "expected"),
        (partial(DeformRoIPool, 1, 1.0, 1), "hidden_channels", 1.5, ConfigError, COUNT),
        (partial(DeformPSRoIPool, 1, 1.0), "in_channels", 0, ConfigError, COUNT),
        (partial(DeformPSRoIPool, 1, 1.0, 1), "mode", "mmcv", ConfigError, "expected"),
        (partial(DeformPSRoIPool, 1, 1.0, 1), "group_size", 0, ShapeError, "expected"),
        (partial(DeformPSRoIPool, 1, 1.0, 1), "classes", 0, ConfigError, COUNT),
        (partial(DeformPSRoIPool, 1, 1.0, 1), "kernel_size", 0, ConfigError, COUNT),
        (partial(DeformPSRoIPool, 1, 1.0, 1), "samples_per_part", 2, ConfigError, 'mode="paper"'),
    ],
)
def test_constructor_checks_settings(
    make: Any, name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(f"`{name}` is {value!r}; {message}")):
        make(**{name: value})


def test_channels_have_no_upper_bound() -> None:
    many = 2**16 + 1
    first = DeformRoIPool(1, 1.0, many, hidden_channels=1).offset_branch[0]
    assert first.in_features == many
    assert DeformPSRoIPool(1, 1.0, 1, classes=many).offset_branch.out_channels == 2 * many
