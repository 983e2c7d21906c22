"""The deformable convolution on a GPU, with the dense one and torchvision's beside it.

Entry point: `bench_convolutions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch

from benchmarks.bench_ops import (
    DENSE,
    LAYOUTS,
    TORCHVISION,
    Shape,
    make_inputs,
    make_operators,
    make_reference,
    move_inputs,
)
from benchmarks.common import (
    BOTH,
    FORWARD,
    OURS,
    Call,
    Inputs,
    Operator,
    alternate,
    gradient_like,
    run_backward,
    run_forward,
    worst_error,
)
from benchmarks.gpu_timing import GpuClock, kernel_shares, peak_memory

WRONG = "wrong, not timed"  # in place of a pass
NUM_PRODUCTS = {FORWARD: 1, BOTH: 3}  # matrix products by pass
# By dtype: the largest relative error of a result that is timed. float32 uses TF32.
DTYPES = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 3e-3}
_ROTATED_BYTES = 200 << 20  # of different inputs in a turn, several times the L2 cache

SHAPES = (Shape(8, 512, 65, 2), Shape(8, 256, 128, 1), Shape(8, 64, 256, 1))
QUICK_SHAPES = (Shape(2, 16, 9, 2),)


def count_flops(shape: Shape, passed: str) -> int:
    """Return the operations of the matrix products; sampling is not counted."""
    return NUM_PRODUCTS[passed] * 2 * 9 * shape.channels**2 * shape.batch * shape.size**2


def count_bytes(shape: Shape, passed: str, item_bytes: int) -> int:
    """Return the least DRAM traffic: each input is read once, each output written once."""
    map_bytes = shape.batch * shape.channels * shape.size**2 * item_bytes
    offset_bytes = shape.batch * 18 * shape.size**2 * 4
    weight_bytes = 9 * shape.channels**2 * item_bytes
    if passed == FORWARD:
        return 2 * map_bytes + offset_bytes + weight_bytes
    # Input, offset and weight are read twice, the gradient once; three gradients are written.
    return 5 * map_bytes + 3 * offset_bytes + 3 * weight_bytes


@dataclass(frozen=True)
class Bench:
    """The device, the limits measured on it (`measure_ceilings`), and the number of rounds."""

    device: torch.device
    ceilings: Mapping[str, float]
    rounds: int


def bench_convolutions(bench: Bench, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape, dtype, layout and pass, or one that reports a wrong result."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        drawn = make_inputs(shape)
        doubles = tuple(each.to(bench.device).double().requires_grad_() for each in drawn)
        truths = run_backward(make_reference(shape.dilation), doubles, gradient_like)
        for dtype in DTYPES:
            for layout in LAYOUTS:
                inputs = move_inputs(drawn, bench.device, getattr(torch, dtype), layout)
                operators = make_operators(shape.dilation, "native")
                errors, left_out = measure_errors(operators, inputs, truths)
                for name in left_out:
                    del operators[name]
                about: dict[str, Any] = {"shape": str(shape), "dtype": dtype, "layout": layout}
                about |= {"errors": errors, "left_out": left_out}
                if not errors[OURS] < DTYPES[dtype]:
                    yield {**about, "pass": WRONG, "contenders": {}, "kernels": []}
                    continue
                sets = copy_inputs(inputs)
                for passed, run in ((FORWARD, run_forward), (BOTH, run_backward)):
                    calls = {
                        name: _rotate(partial(run, op), sets) for name, op in operators.items()
                    }
                    row = _time_pass(bench, shape, dtype, passed, calls, len(sets))
                    for name, numbers in row["contenders"].items():
                        numbers["error"] = errors.get(name)
                    yield {**about, **row}


def copy_inputs(inputs: Inputs) -> list[Inputs]:
    """Return copies that together are larger than the L2 cache; two on the CPU."""
    is_cuda = inputs[0].is_cuda
    num_sets = 1 + _ROTATED_BYTES // sum(each.nbytes for each in inputs) if is_cuda else 2
    return [
        tuple(each.detach().clone().requires_grad_() for each in inputs) for _ in range(num_sets)
    ]


def measure_errors(
    operators: Mapping[str, Operator], inputs: Inputs, truths: Inputs
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the errors of dcnseg and torchvision, and why torchvision is left out, if it is."""

    def error_of(name: str) -> float:
        return worst_error(run_backward(operators[name], inputs, gradient_like), truths)

    errors = {OURS: error_of(OURS)}
    try:
        errors[TORCHVISION] = error_of(TORCHVISION)
    except (RuntimeError, NotImplementedError) as error:  # it does not support every dtype
        return errors, {TORCHVISION: str(error).partition("\n")[0]}
    return errors, {}


def _time_pass(
    bench: Bench, shape: Shape, dtype: str, passed: str, calls: Mapping[str, Call], num_calls: int
) -> dict[str, Any]:
    timings = alternate(calls, bench.rounds, GpuClock(bench.device, num_calls))
    memory = {name: peak_memory(call, bench.device) for name, call in calls.items()}
    work = count_flops(shape, passed)
    traffic = count_bytes(shape, passed, getattr(torch, dtype).itemsize)
    contenders = {}
    for name, timing in timings.items():
        peak, dense_peak = memory[name], memory[DENSE]
        tflops = work / timing.median / 1e9
        contenders[name] = {
            "milliseconds": timing.median,
            "spread": timing.spread,
            "ratio_to_dense": timing.ratio_to(timings[DENSE]),
            "tflops": tflops,
            "share_of_arithmetic": tflops / bench.ceilings[dtype],
            "share_of_bandwidth": traffic / timing.median / 1e9 / bench.ceilings["copy"],
            "peak_mib": peak,
            "mib_over_dense": None if peak is None or dense_peak is None else peak - dense_peak,
        }
    kernels = kernel_shares(calls[OURS], bench.device)[:10]
    return {"pass": passed, "contenders": contenders, "kernels": kernels}


def _rotate(run: Callable[[Inputs], object], sets: list[Inputs]) -> Call:
    """Return a function that uses the next inputs in each call, so that caches do not help."""
    remaining = cycle(sets)
    return lambda: run(next(remaining))
