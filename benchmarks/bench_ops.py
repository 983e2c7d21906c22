"""Time the deformable convolution on the CPU, with the dense one and other libraries' beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from benchmarks.common import (
    OURS,
    Comparison,
    Inputs,
    Operator,
    make_parser,
    odd_sixteenths,
    report,
)
from benchmarks.rivals import installed_versions, make_rivals
from dcnseg.ops import deform_conv2d
from dcnseg.ops.backend import Backend

DENSE, TORCHVISION = "dense convolution", "torchvision"
LAYOUTS = {"channels-first": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass(frozen=True)
class Shape:
    """A padded 3x3 convolution that keeps size and channels."""

    batch: int
    channels: int
    size: int
    dilation: int

    def __str__(self) -> str:
        sizes = f"[{self.batch},{self.channels},{self.size},{self.size}]"
        return f"{sizes} dilation {self.dilation}"


SHAPES = (Shape(1, 512, 33, 2), Shape(1, 512, 65, 2), Shape(1, 256, 64, 1), Shape(1, 64, 128, 1))
QUICK_SHAPES = (Shape(1, 16, 9, 2),)


def make_operators(dilation: int, backend: Backend = "auto") -> dict[str, Operator]:
    """Return the contenders with a backward pass, as functions of input, offset and weight."""
    window = (None, 1, dilation, dilation)  # bias, stride, padding, dilation

    def torchvisions(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        # It has no bfloat16 and computes in float32 under autocast.
        dtype = torch.float32 if input.dtype == torch.bfloat16 else input.dtype
        output: Tensor = torchvision.ops.deform_conv2d(
            input.to(dtype), offset.to(dtype), weight.to(dtype), *window
        )
        return output.to(input.dtype)

    return {
        DENSE: lambda input, offset, weight: F.conv2d(input, weight, *window),
        OURS: lambda input, offset, weight: deform_conv2d(
            input, offset, weight, *window, backend=backend
        ),
        TORCHVISION: torchvisions,
    }


def make_reference(dilation: int) -> Operator:
    """Return the PyTorch code, called image by image to save memory."""
    operator = make_operators(dilation, "reference")[OURS]

    def reference(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        images = zip(input.split(1), offset.split(1), strict=True)
        return torch.cat([operator(*image, weight) for image in images])

    return reference


def make_inputs(shape: Shape) -> Inputs:
    """Draw input, offset and weight with values that are exact in every dtype."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, size = shape.batch, shape.channels, shape.size
    input = torch.randn(batch, channels, size, size, generator=generator)
    offset = torch.randn(batch, 18, size, size, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    return (8 * input).round() / 8, odd_sixteenths(offset), (20 * weight).round() / 1024


def move_inputs(
    inputs: Inputs, device: torch.device | str, dtype: torch.dtype, layout: str
) -> Inputs:
    """Convert the inputs and let them require gradients; the offset stays in float32."""
    input, offset, weight = inputs
    memory_format = LAYOUTS[layout]
    moved = (
        input.to(device, dtype, memory_format=memory_format),
        offset.to(device),
        weight.to(device, dtype, memory_format=memory_format),
    )
    return tuple(tensor.detach().requires_grad_() for tensor in moved)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--channels-last", action="store_true", help="memory format of the input")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    layout = "channels-last" if options.channels_last else "channels-first"
    comparisons = []
    left_out: dict[str, str] = {}
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        inputs = move_inputs(make_inputs(shape), "cpu", dtype, layout)
        rivals, left_out = make_rivals(inputs, shape.dilation, options.threads)
        operators = make_operators(shape.dilation)
        yardsticks = {DENSE: operators.pop(DENSE)}
        if dtype != torch.float32:
            del operators[TORCHVISION]
            left_out[TORCHVISION] = f"has no {options.dtype} on the CPU"
        comparisons.append(
            Comparison(
                str(shape),
                inputs,
                make_reference(shape.dilation),
                operators,
                yardsticks,
                rivals,
                tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4,
            )
        )
    title = f"Deformable convolution 3x3, {options.dtype}, {layout}"
    report(title, comparisons, options, left_out, installed_versions())


if __name__ == "__main__":
    main()
