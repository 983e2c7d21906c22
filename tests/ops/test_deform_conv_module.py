from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnseg.errors import ConfigError, ShapeError
from dcnseg.ops import DeformConv2d, deform_conv2d

SETTINGS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "groups": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "bias": False},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of the plain convolution
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("modulated", [False, True])
def test_initially_equals_the_plain_convolution(settings: dict[str, Any], modulated: bool) -> None:
    plain = nn.Conv2d(4, 6, **settings)
    layer = DeformConv2d(4, 6, **settings, offset_groups=2, modulated=modulated)
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["conv_offset.weight", "conv_offset.bias"]
    assert missing.unexpected_keys == []
    input = torch.randn(2, 4, 9, 10)
    torch.testing.assert_close(layer(input), plain(input), rtol=0, atol=1e-5)


def test_weights_equal_those_of_a_plain_convolution_with_the_same_seed() -> None:
    torch.manual_seed(3)
    plain = nn.Conv2d(4, 6, 3)
    after_plain = torch.rand(1)
    torch.manual_seed(3)
    layer = DeformConv2d(4, 6, 3)
    torch.testing.assert_close(torch.rand(1), after_plain, rtol=0, atol=0)
    torch.testing.assert_close(layer.weight, plain.weight, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("settings", SETTINGS)
def test_from_conv_shares_the_parameters(settings: dict[str, Any]) -> None:
    plain = nn.Conv2d(4, 6, **settings, dtype=torch.float64).eval()
    layer = DeformConv2d.from_conv(plain, offset_groups=4, modulated=True)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.training
    assert layer.conv_offset.weight.dtype == torch.float64
    assert layer.conv_offset.out_channels == 3 * 4 * plain.weight[0, 0].numel()
    input = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(input), plain(input), rtol=0, atol=1e-12)


@pytest.mark.parametrize("modulated", [False, True])
def test_forward_uses_the_predicted_offsets(modulated: bool) -> None:
    layer = DeformConv2d(4, 6, 3, padding=2, dilation=2, offset_groups=2, modulated=modulated)
    nn.init.normal_(layer.conv_offset.weight, std=0.2)
    input = torch.randn(2, 4, 7, 8)
    seen: list[Tensor] = []
    layer.conv_offset.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    output = layer(input)
    offset, mask = layer.predict_offset(input)
    torch.testing.assert_close(seen[0][:, :36], offset)
    assert offset.shape == (2, 36, 7, 8)
    if modulated:
        assert mask is not None
        torch.testing.assert_close(mask, 2 * torch.sigmoid(seen[0][:, 36:]))
    else:
        assert mask is None
    expected = deform_conv2d(
        input, offset, layer.weight, layer.bias, 1, 2, 2, mask, backend="reference"
    )
    torch.testing.assert_close(output, expected)


def test_all_parameters_get_gradients() -> None:
    layer = DeformConv2d(4, 6, 3, padding=1, modulated=True)
    layer(torch.randn(1, 4, 8, 8)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_backend_attribute_is_used() -> None:
    layer = DeformConv2d(4, 6, 3)
    layer.backend = "none"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="`backend` is 'none'"):
        layer(torch.randn(1, 4, 8, 8))


def test_copy_reset_and_repr() -> None:
    layer = copy.deepcopy(DeformConv2d(4, 6, 3, offset_groups=2, modulated=True))
    nn.init.ones_(layer.conv_offset.weight)
    layer.reset_parameters()
    assert not layer.conv_offset.weight.any()
    assert repr(layer).startswith(
        "DeformConv2d(\n  4, 6, kernel_size=(3, 3), stride=(1, 1), offset_groups=2, modulated=True"
    )


def test_works_under_autocast() -> None:
    layer = DeformConv2d(4, 6, 3, modulated=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.randn(1, 4, 8, 8))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("offset_groups", [0, 3])
def test_offset_groups_must_divide_the_channels(offset_groups: int) -> None:
    with pytest.raises(ShapeError, match=f"`in_channels` is 4; .* offset_groups={offset_groups}, "):
        DeformConv2d(4, 6, 3, offset_groups=offset_groups)


def test_border_of_a_layer_is_used_and_shown() -> None:
    layer = DeformConv2d.from_conv(nn.Conv2d(1, 1, 1, bias=False), border="dcnv1")
    nn.init.ones_(layer.weight)
    assert layer.conv_offset.bias is not None
    nn.init.constant_(layer.conv_offset.bias, 0.75)  # after the center of the only pixel
    assert layer(torch.ones(1, 1, 1, 1)).item() == 1
    layer.border = "zero"
    assert layer(torch.ones(1, 1, 1, 1)).item() == 0.0625
    assert "border=dcnv1" in repr(DeformConv2d(1, 1, 1, border="dcnv1"))
