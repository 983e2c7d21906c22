from __future__ import annotations

import pickle
import re
import socket

import pytest
import torch
from torch import nn

from dcnseg.errors import ConfigError
from dcnseg.models import encoder as encoder_module
from dcnseg.models.encoder import build_encoder, dilate_late, make_deformable
from dcnseg.ops.deform_conv.module import DeformConv2d


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_output_stride(name: str, output_stride: int) -> None:
    encoder = build_encoder(name, output_stride=output_stride).eval()
    features = encoder(torch.zeros(1, 3, 96, 64))
    assert features[-1].shape[-2:] == (96 // output_stride, 64 // output_stride)


def test_make_deformable_replaces_the_layers_of_the_paper() -> None:
    names = make_deformable(build_encoder("resnet50", output_stride=16), 6)
    layers = ("layer3.3", "layer3.4", "layer3.5", "layer4.0", "layer4.1", "layer4.2")
    assert names == [f"{layer}.conv2" for layer in layers]


def test_replaced_layers_keep_geometry_and_weights() -> None:
    encoder = build_encoder("resnet18", output_stride=16)
    before = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}
    for name in make_deformable(encoder, 3):
        layer, plain = encoder.get_submodule(name), before[name]
        assert isinstance(layer, DeformConv2d)
        assert layer.weight is plain.weight
        for attribute in ("stride", "padding", "dilation", "groups"):
            assert getattr(layer, attribute) == getattr(plain, attribute)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_dilate_late_changes_the_last_three_layers_and_no_size(name: str) -> None:
    encoder = build_encoder(name, output_stride=16).eval()
    image = torch.randn(1, 3, 96, 64)
    before = encoder(image)
    dilate_late(encoder, 6)
    dilated = [
        layer
        for layer, module in encoder.named_modules()
        if isinstance(module, nn.Conv2d) and module.dilation == (6, 6)
    ]
    assert dilated == make_deformable(encoder, 3)
    after = encoder(image)
    assert [each.shape for each in after] == [each.shape for each in before]
    torch.testing.assert_close(after[-2], before[-2])
    assert not torch.allclose(after[-1], before[-1])


def test_make_deformable_with_zero_layers() -> None:
    encoder = build_encoder("resnet18", output_stride=16)
    assert make_deformable(encoder, 0) == []
    assert not any(isinstance(module, DeformConv2d) for module in encoder.modules())


def test_settings_that_do_not_fit_the_encoder_are_errors() -> None:
    with pytest.raises(ConfigError, match="--late-dilation is 2, but this encoder has 0 plain"):
        dilate_late(nn.Conv2d(3, 3, 1), 2)
    encoder = build_encoder("resnet18", output_stride=16)
    with pytest.raises(ConfigError, match="--deform-layers is 99, but this encoder has 16 plain"):
        make_deformable(encoder, 99)
    with pytest.raises(ConfigError, match="--offset-groups is 7, which does not divide the 512"):
        make_deformable(encoder, 1, offset_groups=7)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "resnet19",
            "'resnet19', which segmentation-models-pytorch does not provide. Did you mean",
        ),
        ("ResNet18", "does not provide. Did you mean resnet18?"),
        ("tu-ResNet18", "does not provide. Did you mean tu-resnet18?"),
        ("xyz", "does not provide. Recommended: the ResNet"),
        (
            "densenet121",
            "--encoder densenet121 cannot be built with output stride 16: it does not support dil",
        ),
        ("tu-dla34", "it does not support dilation, so its output stride is always 32. Choose"),
        ("tu-ghostnet_050", "its output stride is always 32 (only output_stride==32 is valid"),
        (
            "mobileone_s0",
            "x cannot be made deformable: 4 of its 3x3 convolutions, stage4.0.rbr_conv.0.conv to ",
        ),
        ("efficientnet-b0", "--deform-layers is 3, but x has 0 plain 3x3"),
    ],
)
def test_unsupported_encoder_is_an_error(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        make_deformable(build_encoder(name, output_stride=16), 3, name="x")


class Strides(nn.Module):
    """An encoder with features of these strides."""

    def __init__(self, *strides: int) -> None:
        super().__init__()
        self.strides = strides

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x[..., ::stride, ::stride] for stride in self.strides]


@pytest.mark.parametrize(
    "strides", [(1, 2, 4, 8, 16, 32), (1, 2, 4, 4, 4, 16), (1, 2, 4, 16, 16), (1, 1, 4, 8, 16, 16)]
)
def test_unexpected_feature_strides_are_an_error(
    strides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_module, "_smp_encoder", lambda *_: Strides(*strides))
    listed = ", ".join(map(str, strides))
    with pytest.raises(ConfigError, match=f"resnet18 has feature strides {listed}; DeepLab needs"):
        build_encoder("resnet18", output_stride=16)


def test_subsampled_1x1_convolutions_keep_values_and_gradients() -> None:
    """See `_subsample_before_convolving`."""
    encoder = pickle.loads(pickle.dumps(build_encoder("mobileone_s1", output_stride=16)))
    branch = encoder.stage0.rbr_scale.conv
    assert branch.stride == (1, 1)
    weight = branch.weight.detach().clone().requires_grad_()
    x = torch.randn(4, 3, 64, 96)
    expected = nn.functional.conv2d(x, weight, stride=2)
    expected.square().sum().backward()
    actual = branch.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    actual.square().sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(branch.weight.grad, weight.grad, rtol=1e-4, atol=1e-3)


HOSTILE_NAMES = (
    *("tu-hf-hub:evil/x", "tu-hf_hub:evil/x", "tu-HF-HUB:evil/x", "hf-hub:evil/x", "tu-evil/x"),
    *("tu-local-dir:/tmp/x", "tu-https://evil/x", "tu-resnet18.hf-hub:evil/x", "tu-/tmp/resnet18"),
    *("timm-regnet/hf-hub:evil/x", "timm-res2hf-hub:evil/x", "tu-tu-hf-hub:evil/x"),
    "tu-resnet18@x",
    *("", "tu-", "tu-.", "../resnet18", "resnet18\n", "tu-resnet18\n", "x" * 10_000, "tu-\u212a"),
)


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_settings: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("socket", "getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_encoder_name_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^--encoder is .{,200} which segmentation-models-pyt"):
        build_encoder(name, output_stride=16)


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize(
    "name", ["resnet18", "tu-resnet18", "tu-resnet18.a1_in1k", "timm-gernet_s"]
)
def test_installed_encoders_are_built_without_a_connection(name: str) -> None:
    with torch.device("meta"):
        build_encoder(name, output_stride=16)
