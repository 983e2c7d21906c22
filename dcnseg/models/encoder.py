"""Encoder surgery: an encoder of segmentation-models-pytorch with deformable late convolutions.

Entry points: `build_encoder`, `dilate_late` and `make_deformable`.
"""

from __future__ import annotations

import re
import warnings

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from dcnseg.errors import ConfigError
from dcnseg.ops.deform_conv import DeformConv2d
from dcnseg.validation import shown

LATE_LAYERS = 3
PROBE_SIZE = 64  # pixels; any multiple of 32 shows the layers' order and the feature strides


def build_encoder(name: str, *, output_stride: int) -> nn.Module:
    """An smp encoder with random weights whose last features have `output_stride`.

    Weights are never looked up here, so that a network can be rebuilt without a connection.

    Raises:
        ConfigError: smp has no such encoder, or it cannot be dilated to the output stride.
    """
    require_installed_encoder(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            encoder = smp.encoders.get_encoder(
                name, in_channels=3, depth=5, weights=None, output_stride=output_stride
            )
        strides = _feature_strides(encoder)
    except Exception as error:  # each family of encoders has its own way to refuse a stride
        raise ConfigError(
            f"--encoder {name} cannot be built with output stride {output_stride} "
            f"({str(error).rstrip('.')}). "
            "Choose a ResNet-family encoder such as resnet50."
        ) from error
    assert isinstance(encoder, nn.Module)
    if strides != (4, output_stride):
        raise ConfigError(
            f"--encoder {name} gives features of stride {strides[0]} and {strides[1]}; DeepLab "
            f"needs 4 and {output_stride}. Choose a ResNet-family encoder such as resnet50."
        )
    return encoder


def require_installed_encoder(name: str) -> None:
    """Raise a ConfigError unless the installed smp has this encoder, or timm for a name with `tu-`.

    timm takes names of repositories, which it downloads, and of folders, too; they are refused.
    """
    model = name.removeprefix("timm-").removeprefix("tu-")
    is_timm = model != name and re.fullmatch(r"[\w.]+", model) and timm.is_model(model)
    if name not in smp.encoders.encoders and not is_timm:
        raise ConfigError(
            f"--encoder is {shown(name)}, which segmentation-models-pytorch does not have. The "
            "ResNet family fits best: resnet18, resnet34, resnet50, resnet101, resnext50_32x4d."
        )


def dilate_late(encoder: nn.Module, dilation: int) -> None:
    """Give the last three plain 3x3 convolutions of the encoder this dilation, in place.

    They are padded by as much, so that the sizes of all features stay the same.

    Raises:
        ConfigError: the encoder has fewer such convolutions.

    Source: Dai et al. 2017, Table 3, whose fixed dilations the learnt offsets are compared with.
    """
    names = _convolutions_3x3_in_execution_order(encoder)[-LATE_LAYERS:]
    if len(names) < LATE_LAYERS:
        raise ConfigError(
            f"--late-dilation is {dilation}, but this encoder has {len(names)} plain 3x3 "
            f"convolutions instead of {LATE_LAYERS}. Choose an encoder of the ResNet family."
        )
    for name in names:
        convolution = encoder.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        convolution.dilation = convolution.padding = (dilation, dilation)


def make_deformable(
    encoder: nn.Module, num_layers: int, *, offset_groups: int = 1, modulated: bool = False
) -> list[str]:
    """Replace the last `num_layers` 3x3 convolutions of the encoder by `DeformConv2d`, in place.

    Weights, strides and dilations are kept; the offsets start at zero, so the function computed
    stays the same. Layers are counted from the end in the order of execution.

    Returns:
        Names of the replaced layers in the order of execution.

    Raises:
        ConfigError: the encoder has fewer 3x3 convolutions, or one that cannot be replaced.

    Source: Dai et al. 2017, section 4.2 and Table 1.
    """
    if num_layers == 0:
        return []
    candidates = _convolutions_3x3_in_execution_order(encoder)
    if num_layers > len(candidates):
        raise ConfigError(
            f"--deform-layers is {num_layers}, but this encoder has {len(candidates)} plain 3x3 "
            "convolutions that can be replaced. Choose fewer (0 is the plain network), or an "
            "encoder of the ResNet family."
        )
    names = candidates[-num_layers:]
    for name in names:
        convolution = encoder.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        if convolution.in_channels % offset_groups:
            raise ConfigError(
                f"--offset-groups is {offset_groups}, which does not divide the "
                f"{convolution.in_channels} channels of {name}."
            )
        parent = encoder.get_submodule(name.rpartition(".")[0])
        deformable = DeformConv2d.from_conv(
            convolution, offset_groups=offset_groups, modulated=modulated
        )
        setattr(parent, name.rpartition(".")[2], deformable)
    return names


def _feature_strides(encoder: nn.Module) -> tuple[int, int]:
    """Strides of the features that DeepLabV3+ fuses: the third, and the last."""
    features = _probe(encoder)
    return PROBE_SIZE // features[2].shape[-1], PROBE_SIZE // features[-1].shape[-1]


def _probe(encoder: nn.Module) -> list[torch.Tensor]:
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        features: list[torch.Tensor] = encoder(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
    encoder.train(was_training)
    return features


def _convolutions_3x3_in_execution_order(encoder: nn.Module) -> list[str]:
    order: list[str] = []

    def note(name: str) -> None:
        if name not in order:
            order.append(name)

    # Subclasses of Conv2d pad or normalise in their own ways, which from_conv would lose.
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: note(name))
        for name, module in encoder.named_modules()
        if type(module) is nn.Conv2d
        and module.kernel_size == (3, 3)
        and module.padding_mode == "zeros"
    ]
    try:
        _probe(encoder)
    finally:
        for handle in handles:
            handle.remove()
    return order
