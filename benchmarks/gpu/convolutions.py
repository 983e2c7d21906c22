"""The deformable convolution on a GPU, beside the dense one and torchvision's.

Entry point: `bench_convolutions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from benchmarks.common import OURS, Operator, alternate
from benchmarks.gpu.operator_cases import gradient_like, odd_sixteenths
from benchmarks.gpu.timing import GpuClock, kernel_shares, peak_memory
from dcnseg.ops import deform_conv2d

DENSE, TORCHVISION = "dense (cuDNN)", "torchvision"
FORWARD, BOTH = "forward", "forward+backward"
WRONG = "wrong, not timed"  # instead of a pass
PASSES = {FORWARD: 1, BOTH: 3}  # and how many products there are
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
# By dtype: the largest error, relative to the norm of the truth, with which it may be timed.
DTYPES = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 3e-3}  # float32 as TF32
_ROTATED_BYTES = 200 << 20  # of different inputs in a turn, several times the caches


@dataclass(frozen=True)
class Shape:
    """A padded 3x3 convolution that keeps size and channels."""

    batch: int
    channels: int
    size: int
    dilation: int = 1

    def __str__(self) -> str:
        dilated = f" d{self.dilation}" if self.dilation > 1 else ""
        return f"[{self.batch},{self.channels},{self.size},{self.size}]{dilated}"

    @property
    def flops(self) -> int:
        """Of the product of one forward; the sampling is not counted."""
        return 2 * 9 * self.channels**2 * self.batch * self.size**2

    def least_bytes(self, passed: str, item: int) -> int:
        """What must travel: each input read once, each output written once."""
        map_bytes = self.batch * self.channels * self.size**2 * item
        offset_bytes = self.batch * 18 * self.size**2 * 4
        weight_bytes = 9 * self.channels**2 * item
        if passed == FORWARD:
            return 2 * map_bytes + offset_bytes + weight_bytes
        # Twice read: map, offset, weight; once the gradient, and three gradients are written.
        return 5 * map_bytes + 3 * offset_bytes + 3 * weight_bytes


SHAPES = (Shape(8, 512, 65, 2), Shape(8, 256, 128), Shape(8, 64, 256))
QUICK_SHAPES = (Shape(2, 16, 9, 2),)

Inputs = dict[str, Tensor]


def make_inputs(shape: Shape, seed: int) -> Inputs:
    """Values that every dtype holds, so that one exact result serves all of them."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.channels, shape.size, shape.size)
    input = (8 * torch.randn(size, generator=generator)).round() / 8
    offset = odd_sixteenths(
        torch.randn(shape.batch, 18, shape.size, shape.size, generator=generator)
    )
    weight = torch.randn(shape.channels, shape.channels, 3, 3, generator=generator)
    return {"input": input, "offset": offset, "weight": (20 * weight).round() / 1024}


def move(inputs: Inputs, device: torch.device, dtype: torch.dtype, layout: str) -> Inputs:
    """To where and how they are used; the offsets stay in float32."""
    return {
        name: tensor.to(device)
        if name == "offset"
        else tensor.to(device, dtype, memory_format=LAYOUTS[layout])
        for name, tensor in inputs.items()
    }


def make_contenders(dilation: int) -> dict[str, Operator]:
    """Functions of input, offset and weight."""
    window = (None, 1, dilation, dilation)  # bias, stride, padding, dilation

    def torchvisions(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        # It has no bfloat16, and computes in float32 under autocast.
        dtype = torch.float32 if input.dtype == torch.bfloat16 else input.dtype
        made: Tensor = torchvision.ops.deform_conv2d(
            input.to(dtype), offset.to(dtype), weight.to(dtype), *window
        )
        return made.to(input.dtype)

    return {
        OURS: lambda input, offset, weight: deform_conv2d(
            input, offset, weight, *window, backend="native"
        ),
        DENSE: lambda input, offset, weight: F.conv2d(input, weight, *window),
        TORCHVISION: torchvisions,
    }


def run_backward(operator: Operator, inputs: Inputs) -> tuple[Tensor, ...]:
    """Output and gradients of all inputs that have one."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
    output = operator(*leaves)
    grads = torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)
    return output.detach(), *(grad for grad in grads if grad is not None)


def run_forward(operator: Operator, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return operator(*inputs.values())


def exact_results(shape: Shape, inputs: Inputs, device: torch.device) -> tuple[Tensor, ...]:
    """By plain code in float64, image by image."""
    exact = [tensor.to(device).double().requires_grad_() for tensor in inputs.values()]
    outputs = [
        deform_conv2d(
            exact[0][i : i + 1],
            exact[1][i : i + 1],
            exact[2],
            None,
            1,
            shape.dilation,
            shape.dilation,
            backend="reference",
        )
        for i in range(shape.batch)
    ]
    output = torch.cat(outputs)
    grads = torch.autograd.grad(output, exact, gradient_like(output))
    return output.detach(), *grads


def worst_error(operator: Operator, inputs: Inputs, truths: tuple[Tensor, ...]) -> float:
    """Of the output and the gradients, relative to the norm of the truth."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
    output = operator(*leaves)
    grads = torch.autograd.grad(output, leaves, gradient_like(output))
    errors = [
        float((result.detach().double() - truth).norm() / truth.norm())
        for result, truth in zip((output, *grads), truths, strict=True)
    ]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure, and what can be reached there (`measure_ceilings`)."""

    device: torch.device
    ceilings: Mapping[str, float]
    rounds: int

    def floors(self, shape: Shape, passed: str, dtype: str) -> dict[str, float]:
        """Milliseconds that the arithmetic alone needs, and the traffic alone."""
        work = PASSES[passed] * shape.flops
        traffic = shape.least_bytes(passed, getattr(torch, dtype).itemsize)
        return {
            "arithmetic": work / self.ceilings[dtype] / 1e9,
            "bandwidth": traffic / self.ceilings["copy"] / 1e9,
        }


def bench_convolutions(bench: Bench, *, quick: bool) -> Iterator[dict[str, Any]]:
    """One row for each shape, dtype, layout and pass; what is wrong has one that says so."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        drawn = make_inputs(shape, seed=0)
        truths = exact_results(shape, drawn, bench.device)
        for dtype in DTYPES:
            for layout in LAYOUTS:
                inputs = move(drawn, bench.device, getattr(torch, dtype), layout)
                contenders = make_contenders(shape.dilation)
                errors, left_out = compare(contenders, inputs, truths)
                for name in left_out:
                    del contenders[name]
                about: dict[str, Any] = {"shape": str(shape), "dtype": dtype, "layout": layout}
                about |= {"errors": errors, "left_out": left_out}
                if not errors[OURS] < DTYPES[dtype]:
                    yield {**about, "pass": WRONG, "contenders": {}, "kernels": []}
                    continue
                for row in _time_passes(bench, shape, dtype, contenders, inputs):
                    yield {**about, **row}


def compare(
    contenders: Mapping[str, Operator], inputs: Inputs, truths: tuple[Tensor, ...]
) -> tuple[dict[str, float], dict[str, str]]:
    """The worst error of ours and torchvision's, and why torchvision is left out, if it is."""
    errors = {OURS: worst_error(contenders[OURS], inputs, truths)}
    try:
        errors[TORCHVISION] = worst_error(contenders[TORCHVISION], inputs, truths)
    except (RuntimeError, NotImplementedError) as error:  # it does not have every dtype
        return errors, {TORCHVISION: str(error).partition("\n")[0]}
    return errors, {}


def _time_passes(
    bench: Bench, shape: Shape, dtype: str, contenders: Mapping[str, Operator], inputs: Inputs
) -> Iterator[dict[str, Any]]:
    device = bench.device
    num_sets = 2 if device.type != "cuda" else 1 + _ROTATED_BYTES // _bytes(inputs)
    sets = [inputs] + [{n: t.clone() for n, t in inputs.items()} for _ in range(num_sets - 1)]
    clock = GpuClock(device, calls=num_sets)
    for passed, run in ((FORWARD, run_forward), (BOTH, run_backward)):
        calls = {name: _rotating(run, operator, sets) for name, operator in contenders.items()}
        timings = alternate(calls, bench.rounds, clock)
        memory = {name: peak_memory(call, device) for name, call in calls.items()}
        floors = bench.floors(shape, passed, dtype)
        work = PASSES[passed] * shape.flops
        yield {
            "pass": passed,
            "contenders": {
                name: {
                    "milliseconds": timing.median,
                    "spread": timing.spread,
                    "ratio_to_dense": timing.ratio_to(timings[DENSE]),
                    "tflops": work / timing.median / 1e9,
                    "share_of_arithmetic": floors["arithmetic"] / timing.median,
                    "share_of_bandwidth": floors["bandwidth"] / timing.median,
                    "peak_mib": memory[name],
                    "mib_over_dense": _difference(memory[name], memory[DENSE]),
                }
                for name, timing in timings.items()
            },
            "kernels": kernel_shares(calls[OURS], device)[:10],
        }


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _rotating(
    run: Callable[[Operator, Inputs], object], operator: Operator, sets: list[Inputs]
) -> Callable[[], object]:
    """A call on the next of the inputs each time, so that no cache holds them from before."""
    turn = -1

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(sets)
        return run(operator, sets[turn])

    return call


def _bytes(inputs: Inputs) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())
