from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from dcnseg.config import ModelConfig
from dcnseg.errors import ShapeError
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
