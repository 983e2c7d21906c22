"""Time the deformable convolution on the CPU beside the dense one and those of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from benchmarks.common import (
    OURS,
    Report,
    Timing,
    describe_machine,
    make_parser,
    relative_error,
    time_passes,
)
from benchmarks.rivals import installed_versions, make_rivals
from dcnseg.ops import deform_conv2d, native_status

Operator: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of input, offset and weight

DENSE = "dense convolution"


@dataclass(frozen=True)
class Shape:
    """A padded 3x3 convolution that keeps size and channels."""

    channels: int
    size: int
    dilation: int

    def __str__(self) -> str:
        return f"[1,{self.channels},{self.size},{self.size}] dilation {self.dilation}"


SHAPES = (Shape(512, 33, 2), Shape(512, 65, 2), Shape(256, 64, 1), Shape(64, 128, 1))
QUICK_SHAPES = (Shape(16, 9, 2),)


def make_operators(dilation: int, dtype: torch.dtype) -> dict[str, Operator]:
    """The contenders that torch differentiates, by name."""

    def dense(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(input, weight, None, 1, dilation, dilation)

    def ours(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(input, offset, weight, None, 1, dilation, dilation)

    def torchvisions(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        made: Tensor = torchvision.ops.deform_conv2d(
            input, offset, weight, None, 1, dilation, dilation
        )
        return made

    operators: dict[str, Operator] = {DENSE: dense, OURS: ours}
    if dtype == torch.float32:
        operators["torchvision"] = torchvisions
    return operators


def make_inputs(shape: Shape, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, ...]:
    """Input, offset and weight."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.randn(1, shape.channels, shape.size, shape.size).to(dtype)
    offset = torch.randn(1, 18, shape.size, shape.size)
    weight = torch.randn(shape.channels, shape.channels, 3, 3).mul(0.02).to(dtype)
    return (
        input.contiguous(memory_format=memory_format),
        offset,
        weight.contiguous(memory_format=memory_format),
    )


def run_backward(operator: Operator, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Output and gradients of input, offset and weight."""
    input, offset, weight = (tensor.detach().requires_grad_() for tensor in inputs)
    output = operator(input, offset, weight)
    output.backward(torch.ones_like(output))
    return output.detach(), input.grad, offset.grad, weight.grad


def validate(
    operators: Mapping[str, Operator],
    rivals: Mapping[str, Callable[[], Tensor]],
    inputs: tuple[Tensor, ...],
    shape: Shape,
) -> None:
    """Compare every deformable contender with the reference in float64, gradients and all."""

    def reference(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        dilation = shape.dilation
        return deform_conv2d(
            input, offset, weight, None, 1, dilation, dilation, backend="reference"
        )

    truths = run_backward(reference, tuple(tensor.double() for tensor in inputs))
    results: dict[str, tuple[Tensor | None, ...]] = {
        name: run_backward(operator, inputs)
        for name, operator in operators.items()
        if name != DENSE
    }
    results |= {name: (call(),) for name, call in rivals.items()}
    tolerance = 2e-2 if inputs[0].dtype == torch.bfloat16 else 1e-4
    for name, made in results.items():
        for result, truth in zip(made, truths, strict=False):  # rivals have no gradients
            assert result is not None
            assert truth is not None
            error = relative_error(result, truth)
            if not error < tolerance:
                raise SystemExit(f"{name} is wrong on {shape}: relative error {error:.2g}")


def measure(
    shape: Shape,
    inputs: tuple[Tensor, ...],
    rivals: Mapping[str, Callable[[], Tensor]],
    rounds: int,
) -> dict[str, dict[str, Timing]]:
    """Timings by pass and contender."""
    operators = make_operators(shape.dilation, inputs[0].dtype)
    validate(operators, rivals, inputs, shape)
    return time_passes(operators, run_backward, inputs, rounds, rivals)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--channels-last", action="store_true", help="memory order of the map")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)

    shapes = QUICK_SHAPES if options.quick else SHAPES
    cases = []
    for shape in shapes:
        inputs = make_inputs(shape, dtype, options.channels_last)
        cases.append((shape, inputs, *make_rivals(inputs, shape.dilation, options.threads)))
    left_out = dict(cases[0][3])
    if dtype != torch.float32:
        left_out["torchvision"] = f"has no {options.dtype} on the CPU"
    order = "channels-last" if options.channels_last else "channels-first"
    report = Report(
        f"Deformable convolution 3x3, {options.dtype}, {order}",
        {**describe_machine(), **installed_versions(), "native": native_status()["cpu"]},
        left_out,
        as_json=options.json,
    )
    for shape, inputs, rivals, _ in cases:
        for passed, timings in measure(shape, inputs, rivals, options.rounds).items():
            report.add(str(shape), passed, timings)
    report.finish()


if __name__ == "__main__":
    main()
