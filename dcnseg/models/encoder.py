"""Encoders of segmentation-models-pytorch with deformable late convolutions.

Entry points: `build_encoder`, `dilate_late` and `make_deformable`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from dcnseg.errors import ConfigError, short_repr
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.validation import did_you_mean

LATE_LAYERS = 3
MAX_DEPTH = 5  # stages of an encoder
PROBE_SIZE = 64  # pixels; any multiple of 32
SAFE_CHANNELS = 8  # see `_subsample_before_convolving`
ADVICE = "Choose an encoder of the ResNet family, such as resnet50."


def build_encoder(name: str, *, output_stride: int, depth: int = 5) -> nn.Module:
    """Build an smp encoder with random weights and the given output stride.

    Needs no network connection.

    Args:
        name: A name of smp, or of timm with the prefix `tu-`.
        output_stride: Stride of the last feature map, at most 2**depth.
        depth: Number of stages, each with half the resolution of the one before; 3 to 5. The later
            stages of the encoder are removed.

    Raises:
        ConfigError: The encoder is unknown, or cannot be dilated to the output stride.
    """
    require_installed_encoder(name)
    try:
        encoder = _smp_encoder(name, output_stride, depth)
        if depth < MAX_DEPTH:
            _remove_unused_stages(encoder)
        sizes = [feature.shape[-1] for feature in _probe(encoder)]
    except Exception as error:  # each encoder family raises its own exceptions
        raise _make_build_error(name, output_stride, error) from error
    strides = [PROBE_SIZE // size for size in sizes]
    expected = [min(2**stage, output_stride) for stage in range(depth + 1)]
    if strides != expected:
        raise ConfigError(
            f"--encoder {name} has feature strides {_join(strides)}; DeepLab needs "
            f"{_join(expected)}. {ADVICE}"
        )
    _subsample_before_convolving(encoder)
    return encoder


def require_installed_encoder(name: str) -> None:
    """Check that smp, or timm for names with `tu-`, is installed with this encoder.

    Repository names, which timm would download, and folder names are refused.

    Raises:
        ConfigError: The encoder is unknown.
    """
    model = name.removeprefix("timm-").removeprefix("tu-")
    is_timm = model != name and re.fullmatch(r"[\w.]+", model) and timm.is_model(model)
    if name not in smp.encoders.encoders and not is_timm:
        known = smp.encoders.encoders
        if name.startswith("tu-"):
            known = [f"tu-{model}" for model in timm.list_models()]
        raise ConfigError(
            f"--encoder is {short_repr(name)}, which segmentation-models-pytorch does not "
            f"provide.{did_you_mean(name, known)} Recommended: the ResNet family (resnet18, "
            "resnet34, resnet50, resnet101, resnext50_32x4d)."
        )


def _smp_encoder(name: str, output_stride: int, depth: int = MAX_DEPTH) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        encoder = smp.encoders.get_encoder(
            name, in_channels=3, depth=depth, weights=None, output_stride=output_stride
        )
    assert isinstance(encoder, nn.Module)
    return encoder


def _remove_unused_stages(encoder: nn.Module) -> None:
    """Delete the children of an encoder that its forward pass does not reach."""
    used: set[nn.Module] = set()
    handles = [
        module.register_forward_pre_hook(lambda module, _: used.add(module))
        for module in encoder.modules()
    ]
    try:
        _probe(encoder)
    finally:
        for handle in handles:
            handle.remove()
    for name, child in list(encoder.named_children()):
        if used.isdisjoint(child.modules()):
            delattr(encoder, name)


def _make_build_error(name: str, output_stride: int, error: Exception) -> ConfigError:
    """Explain why an encoder cannot be built with this stride; some libraries only assert."""
    reason = str(error).partition("\n")[0].rstrip(".!")
    try:
        _smp_encoder(name, 32)
    except Exception as undilated_error:  # as above
        reason = reason or type(undilated_error).__name__
    else:
        detail = f" ({reason})" if reason else ""
        reason = f"it does not support dilation, so its output stride is always 32{detail}"
    return ConfigError(
        f"--encoder {name} cannot be built with output stride {output_stride}: {reason}. {ADVICE}"
    )


def _subsample_before_convolving(encoder: nn.Module) -> None:
    """Subsample the input of strided 1x1 convolutions instead, with an equal result.

    On a CPU, torch 2.14's weight gradient of such a convolution writes out of bounds if the input
    is channels-last and has fewer than 8 channels. MobileOne and RepVGG have such a branch.
    """
    for module in encoder.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and module.stride != (1, 1)
            and module.in_channels < SAFE_CHANNELS
        ):
            module.register_forward_pre_hook(_Subsample(module.stride))
            module.stride = (1, 1)


class _Subsample:
    """Forward pre-hook that keeps every `stride`-th row and column; a class, for pickling."""

    def __init__(self, stride: Sequence[int]) -> None:
        self.stride = tuple(stride)

    def __call__(self, _module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs[0][..., :: self.stride[0], :: self.stride[1]]


def dilate_late(encoder: nn.Module, dilation: int, *, name: str = "this encoder") -> None:
    """Set the dilation of the last three plain 3x3 convolutions of the encoder, in place.

    The padding is set to the same value, so all feature sizes are unchanged.

    Raises:
        ConfigError: The encoder has fewer than three plain 3x3 convolutions.

    Source: Dai et al. 2017, Table 3, which compares learned offsets with fixed dilations.
    """
    names = list(_find_3x3_convolutions(encoder))[-LATE_LAYERS:]
    if len(names) < LATE_LAYERS:
        raise ConfigError(
            f"--late-dilation is {dilation}, but {name} has {len(names)} plain 3x3 convolutions; "
            f"expected at least {LATE_LAYERS}. {ADVICE}"
        )
    for layer in names:
        convolution = encoder.get_submodule(layer)
        assert isinstance(convolution, nn.Conv2d)
        convolution.dilation = convolution.padding = (dilation, dilation)


def make_deformable(
    encoder: nn.Module,
    num_layers: int,
    *,
    offset_groups: int = 1,
    modulated: bool = False,
    name: str = "this encoder",
) -> list[str]:
    """Replace the last `num_layers` 3x3 convolutions of the encoder with `DeformConv2d`, in place.

    Weights, strides and dilations are kept. The offsets start at zero, so the output is unchanged.
    The last layers are the last ones in execution order.

    Returns:
        Names of the replaced layers in execution order.

    Raises:
        ConfigError: The encoder has fewer 3x3 convolutions, or one that cannot be replaced.

    Source: Dai et al. 2017, section 4.2 and Table 1.
    """
    if num_layers == 0:
        return []
    candidates = _find_3x3_convolutions(encoder)
    if num_layers > len(candidates):
        raise ConfigError(
            f"--deform-layers is {num_layers}, but {name} has {len(candidates)} plain 3x3 "
            f"convolutions. Use fewer (0 for a plain network), or another encoder. {ADVICE}"
        )
    names = list(candidates)[-num_layers:]
    _check_not_parallel(names, candidates, name)
    for layer in names:
        convolution = encoder.get_submodule(layer)
        assert isinstance(convolution, nn.Conv2d)
        if convolution.in_channels % offset_groups:
            raise ConfigError(
                f"--offset-groups is {offset_groups}, which does not divide the "
                f"{convolution.in_channels} input channels of {layer}."
            )
        parent = encoder.get_submodule(layer.rpartition(".")[0])
        deformable = DeformConv2d.from_conv(
            convolution, offset_groups=offset_groups, modulated=modulated
        )
        setattr(parent, layer.rpartition(".")[2], deformable)
    return names


def _probe(encoder: nn.Module) -> list[torch.Tensor]:
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        features: list[torch.Tensor] = encoder(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE))
    encoder.train(was_training)
    return features


def _find_3x3_convolutions(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Return the input of each plain 3x3 convolution by its name, in execution order."""
    order: dict[str, torch.Tensor] = {}

    def note(name: str, x: torch.Tensor) -> None:
        order.setdefault(name, x)

    # Subclasses of Conv2d may pad or normalize differently, which from_conv would lose.
    handles = [
        module.register_forward_pre_hook(lambda _module, inputs, name=name: note(name, inputs[0]))
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


def _check_not_parallel(
    layers: Sequence[str], inputs: Mapping[str, torch.Tensor], name: str
) -> None:
    """Raise a ConfigError if a layer is one of several parallel branches with the same input.

    The order of such branches (in MobileOne) is arbitrary, and separate offsets would prevent
    merging them into one convolution.
    """
    for layer in layers:
        siblings = [other for other in inputs if inputs[other] is inputs[layer]]
        if len(siblings) > 1:
            raise ConfigError(
                f"{name} cannot be made deformable: {len(siblings)} of its 3x3 convolutions, "
                f"{siblings[0]} to {siblings[-1]}, are parallel branches with the same input. Use "
                f"--deform-layers 0, or another encoder. {ADVICE}"
            )


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
