"""Time the deformable convolution on the CPU beside the dense one and torchvision's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from benchmarks.common import Timing, alternate, describe_machine
from dcnseg.ops import deform_conv2d, native_status

Operator: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of input, offset and weight


@dataclass(frozen=True)
class Shape:
    """A padded 3x3 convolution that keeps size and channels."""

    channels: int
    size: int
    dilation: int

    def __str__(self) -> str:
        return f"[1,{self.channels},{self.size},{self.size}] dilation {self.dilation}"


SHAPES = (Shape(512, 33, 2), Shape(512, 65, 2), Shape(256, 64, 1), Shape(64, 128, 1))


def make_operators(dilation: int, dtype: torch.dtype) -> dict[str, Operator]:
    """The contenders by name."""

    def dense(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(input, weight, None, 1, dilation, dilation)

    def ours(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(input, offset, weight, None, 1, dilation, dilation)

    def rival(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        made: Tensor = torchvision.ops.deform_conv2d(
            input, offset, weight, None, 1, dilation, dilation
        )
        return made

    operators: dict[str, Operator] = {"dense conv": dense, "dcnseg": ours}
    if dtype == torch.float32:  # torchvision's has no bfloat16 on the CPU
        operators["torchvision"] = rival
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


def validate(operators: dict[str, Operator], inputs: tuple[Tensor, ...], shape: Shape) -> None:
    """Compare every deformable contender with the reference in float64."""
    dilation = shape.dilation
    exact_inputs = tuple(tensor.double() for tensor in inputs)

    def reference(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(
            input, offset, weight, None, 1, dilation, dilation, backend="reference"
        )

    exact = run_backward(reference, exact_inputs)
    tolerance = 2e-2 if inputs[0].dtype == torch.bfloat16 else 1e-4
    for name, operator in operators.items():
        if name == "dense conv":
            continue
        for result, truth in zip(run_backward(operator, inputs), exact, strict=True):
            assert result is not None
            assert truth is not None
            error = float((result.double() - truth).abs().max() / truth.abs().max())
            if not error < tolerance:
                raise SystemExit(f"{name} is wrong on {shape}: relative error {error:.2g}")


def measure(
    shape: Shape, dtype: torch.dtype, channels_last: bool, rounds: int
) -> dict[str, dict[str, Timing]]:
    """Timings by pass and contender."""
    inputs = make_inputs(shape, dtype, channels_last)
    operators = make_operators(shape.dilation, dtype)
    validate(operators, inputs, shape)

    def forward(operator: Operator) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return operator(*inputs)

        return call

    def both(operator: Operator) -> Callable[[], object]:
        return lambda: run_backward(operator, inputs)

    return {
        "forward": alternate({name: forward(op) for name, op in operators.items()}, rounds),
        "forward+backward": alternate({name: both(op) for name, op in operators.items()}, rounds),
    }


def print_row(shape: Shape, passed: str, timings: dict[str, Timing]) -> None:
    ours = timings["dcnseg"]
    cells = [f"{timing.median:8.1f} ±{timing.spread:5.1f}" for timing in timings.values()]
    ratios = [f"{ours.ratio_to(timings['dense conv']):13.2f}"]
    if "torchvision" in timings:
        ratios.append(f"{timings['torchvision'].ratio_to(ours):17.1f}")
    print(f"{shape!s:28} {passed:17}", *cells, *ratios, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--channels-last", action="store_true", help="memory order of the map")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    machine = describe_machine() | {"native": native_status()["cpu"], "dtype": options.dtype}
    names = list(make_operators(1, dtype))
    if not options.json:
        print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
        head = [f"{name:>15}" for name in names] + ["dcnseg/dense"]
        head += ["torchvision/dcnseg"] if "torchvision" in names else []
        print(f"{'median ms, 3x3 kernel':28} {'':17}", *head)
    rows = []
    for shape in SHAPES:
        for passed, timings in measure(shape, dtype, options.channels_last, options.rounds).items():
            if not options.json:
                print_row(shape, passed, timings)
            milliseconds = {
                name: {"median": round(timing.median, 3), "spread": round(timing.spread, 3)}
                for name, timing in timings.items()
            }
            rows.append({"shape": str(shape), "pass": passed, "milliseconds": milliseconds})
    if options.json:
        print(json.dumps({"machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
