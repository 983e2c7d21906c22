"""The deformable convolution in other formats.

`onnx_translations` translates the operator of dcnseg to ONNX; `with_torchvision_layers` replaces it
by that of torchvision, which OpenVINO can read and other programs can load.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from dcnseg.errors import ExportError, NativeOpsError
from dcnseg.inference.optional_packages import import_package
from dcnseg.models.segmenter import Segmenter
from dcnseg.ops._native import missing_reason
from dcnseg.ops.deform_conv.module import DeformConv2d

_ZERO_BORDER = 0  # the operator's argument for border="zero"


def check_layers(model: nn.Module, format: str) -> None:
    """Raise an ExportError for a deformable layer that no export format can express."""
    for name, layer in model.named_modules():
        if isinstance(layer, DeformConv2d) and layer.border != "zero":
            raise ExportError(
                f"the layer {name} has border={layer.border!r}, which --format {format} cannot "
                'express; expected border="zero". Train the network with it.'
            )


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the `custom_translation_table` of `torch.onnx.export` for deformable convolutions.

    It translates `dcnseg.ops.deform_conv2d`, and so `dcnseg.ops.DeformConv2d`, to the standard ONNX
    operator `DeformConv`.

    Raises:
        ConfigError: The package onnxscript is not installed.
        NativeOpsError: The native operators are not available.
    """
    if (reason := missing_reason("cpu")) is not None:
        raise NativeOpsError(f"The native deform_conv2d, which ONNX has a rule for, is {reason}.")
    op = import_package("onnxscript").opset22

    def translate(
        input: Any,
        offset: Any,
        mask: Any,
        weight: Any,
        bias: Any,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        border: int,
        *_kernel_choices: bool,
    ) -> Any:
        if border != _ZERO_BORDER:
            raise ExportError(
                'a deformable convolution has border="dcnv1", which ONNX cannot express; expected '
                'border="zero".'
            )
        kernel_hw = [int(side) for side in weight.shape[2:]]
        return op.DeformConv(
            input,
            weight,
            offset,
            None if _is_empty(bias) else bias,
            None if _is_empty(mask) else mask,
            kernel_shape=kernel_hw,
            strides=[stride_h, stride_w],
            pads=[pad_h, pad_w, pad_h, pad_w],
            dilations=[dilation_h, dilation_w],
            group=int(input.shape[1]) // int(weight.shape[1]),
            offset_group=int(offset.shape[1]) // (2 * kernel_hw[0] * kernel_hw[1]),
        )

    return {torch.ops.dcnseg.deform_conv2d.default: translate}


def _is_empty(value: Any) -> bool:
    """Whether the operator treats a value of the graph as None."""
    return len(value.shape) == 1 and value.shape[0] == 0


class _TorchvisionLayer(nn.Module):
    """A deformable layer that calls torchvision's operator."""

    def __init__(self, layer: DeformConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        layer = self.layer
        offset, mask = layer.predict_offset(input)
        input, padding = layer.pad_input(input)
        stride, dilation = layer.stride, layer.dilation
        output: Tensor = deform_conv2d(
            input, offset, layer.weight, layer.bias, stride, padding, dilation, mask
        )
        return output


def with_torchvision_layers(model: Segmenter) -> Segmenter:
    """Return a copy of a network whose deformable layers call torchvision's operator."""
    copy = deepcopy(model)
    for name, layer in copy.deformable_layers().items():
        copy.set_submodule(name, _TorchvisionLayer(layer))
    return copy
