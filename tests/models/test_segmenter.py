from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor

from dcnseg.config import REGION_HEADS, ModelConfig
from dcnseg.errors import ConfigError, ShapeError
from dcnseg.models.region_head import RegionOutput
from dcnseg.models.segmenter import Segmenter, build_segmenter

SMP_MODELS = {"deeplabv3": smp.DeepLabV3, "deeplabv3plus": smp.DeepLabV3Plus}


def build(**settings: object) -> Segmenter:
    config = ModelConfig(**({"encoder": "resnet18", "decoder_channels": 32} | settings))  # type: ignore[arg-type]
    return build_segmenter(config, num_classes=5)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("architecture", ["deeplabv3", "deeplabv3plus"])
def test_zero_offsets_give_the_output_of_smp(
    architecture: str, output_stride: int, modulated: bool
) -> None:
    plain = SMP_MODELS[architecture](
        "resnet18",
        encoder_weights=None,
        classes=5,
        encoder_output_stride=output_stride,
        decoder_channels=32,
        decoder_atrous_rates=ModelConfig(output_stride=output_stride).atrous_rates,
    ).eval()
    model = build(
        architecture=architecture, output_stride=output_stride, modulated=modulated
    ).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert len(missing) == 6
    assert all(".conv_offset." in name for name in missing)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 96), (70, 20)])
def test_logits_have_the_size_of_the_input(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert build().eval()(torch.randn(1, 3, *size)).shape == (1, 5, *size)


def test_padding_does_not_shift_the_image() -> None:
    model = build().eval()
    x = torch.randn(1, 3, 64, 64)
    padded = torch.zeros(1, 3, 80, 80)
    padded[..., :64, :64] = x
    with torch.no_grad():
        expected = model(padded)[..., :79, :79]
        actual = model(padded[..., :79, :79])  # the dropped row and column hold the padding's value
    torch.testing.assert_close(actual, expected)


def test_wrong_input_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"`x` has shape \[3, 32, 32\]; expected \[B, 3, H, W\]"):
        build()(torch.zeros(3, 32, 32))
    with pytest.raises(ShapeError, match="`x` has one image; training needs at least 2"):
        build().train()(torch.zeros(1, 3, 32, 32))


def test_every_parameter_has_a_gradient() -> None:
    model = build(modulated=True).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    without_gradient = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ]
    assert without_gradient == []


def test_deformable_layers() -> None:
    assert list(build(deform_layers=3).deformable_layers()) == [
        "encoder.layer4.0.conv2",
        "encoder.layer4.1.conv1",
        "encoder.layer4.1.conv2",
    ]


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("architecture", ["deeplabv3", "deeplabv3plus"])
def test_coarse_logits_are_upsampled_by_forward(architecture: str, output_stride: int) -> None:
    model = build(architecture=architecture, output_stride=output_stride).eval()
    x = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        coarse = model.coarse_logits(x)
        size = [side * model.logits_stride for side in coarse.shape[-2:]]
        whole = F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
        torch.testing.assert_close(whole[..., :70, :90], model(x))


# Stride 8 and 16, and fewer stages.
SHAPES: list[dict[str, object]] = [
    {"output_stride": 8},
    {"output_stride": 16},
    {"encoder_depth": 4},
    {"encoder_depth": 3, "architecture": "plain"},
]


@pytest.mark.parametrize("settings", SHAPES, ids=str)
@pytest.mark.parametrize("region_head", REGION_HEADS[1:])
def test_a_region_head_does_not_change_the_segmentation(
    region_head: str, settings: dict[str, object]
) -> None:
    torch.manual_seed(5)
    plain = build(**settings).eval()
    torch.manual_seed(5)
    model = build(**settings, region_head=region_head).eval()
    own, expected = model.state_dict(), plain.state_dict()
    added = own.keys() - expected.keys()
    assert own.keys() >= expected.keys()
    assert added
    assert all(name.startswith("region_head.") for name in added)
    assert all(torch.equal(own[name], value) for name, value in expected.items())
    x = torch.randn(2, 3, 50, 70)
    with torch.no_grad():
        logits = model(x)
        assert isinstance(logits, Tensor)
        assert torch.equal(logits, plain(x))


BOXES = [torch.tensor([[3.0, 5, 40, 44], [20, 10, 69, 50]]), torch.tensor([[0.0, 0, 70, 50]])]


@pytest.mark.parametrize("settings", SHAPES, ids=str)
@pytest.mark.parametrize("region_head", REGION_HEADS[1:])
def test_regions_are_proposed_from_the_logits(
    region_head: str, settings: dict[str, object]
) -> None:
    model = build(**settings, region_head=region_head).eval()
    x = torch.randn(2, 3, 50, 70)
    given: list[Tensor] = []

    def propose(logits: Tensor) -> Sequence[Tensor]:
        given.append(logits)
        return BOXES

    with torch.no_grad():
        logits, output = model(x, propose)
        assert len(given) == 1
        assert torch.equal(given[0], logits)
        assert torch.equal(logits, model(x))
        assert isinstance(output, RegionOutput)
        assert output.logits.shape == (3, 6)  # 5 classes and "no object"
        assert output.deltas.shape == (3, 4)
        coarse, region_map = model.coarse_logits_and_region_map(x)
        assert torch.equal(coarse, model.coarse_logits(x))
        again = model.require_region_head()(region_map, BOXES)
    padded = [math.ceil(side / model.output_stride) * model.output_stride for side in (50, 70)]
    assert region_map.shape[-2:] == tuple(side // 8 for side in padded)
    assert torch.equal(again.logits, output.logits)
    assert torch.equal(again.deltas, output.deltas)


def test_a_region_is_where_its_box_is() -> None:
    """The gradient of the outputs is within the receptive field of the box."""
    model = build(encoder_depth=3, architecture="plain", region_head="rfcn", deform_layers=0)
    x = torch.randn(1, 3, 256, 320, requires_grad=True)
    box = torch.tensor([[240.0, 64.0, 272.0, 96.0]])
    model.eval()(x, lambda _logits: [box])[1].logits.square().sum().backward()
    assert x.grad is not None
    rows, columns = (x.grad.abs().sum(dim=(0, 1, axis)) for axis in (3, 2))
    centers = [
        (torch.arange(len(weights)) * weights).sum() / weights.sum() for weights in (rows, columns)
    ]
    assert float(centers[0]) == pytest.approx(80, abs=8)
    assert float(centers[1]) == pytest.approx(256, abs=8)


def test_a_network_without_a_region_head_cannot_classify_regions() -> None:
    model = build(encoder_depth=3, architecture="plain").eval()
    assert model.region_head is None
    text = "This network has no region head, .* Train one with --region-head deformable-rfcn."
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ConfigError, match=text):
        model(x, lambda _logits: [torch.zeros(0, 4)])
    with pytest.raises(ConfigError, match=text):
        model.coarse_logits_and_region_map(x)
