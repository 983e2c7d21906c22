"""Code shared by the benchmarks: comparisons, turns, statistics, the machine, and reports."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import time
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
import torchvision
from torch import Tensor

from dcnseg import __version__
from dcnseg.ops import native_status

Operator: TypeAlias = Callable[..., Tensor]
Inputs: TypeAlias = tuple[Tensor, ...]
Call: TypeAlias = Callable[[], object]

OURS = "dcnseg"  # the contender that ratios are relative to
FORWARD, BOTH = "forward", "forward+backward"

_CALLS = 3  # of a contender in one turn
_PAUSE = 0.02  # seconds before a turn


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender: its fastest call of each round, in order."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)

    @property
    def spread(self) -> float:
        """Half the interquartile range."""
        if len(self.rounds) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.rounds, n=4)
        return (upper - lower) / 2

    def ratio_to(self, other: Timing) -> float:
        """Return the median of the ratios of the same round."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def take_cpu_turn(call: Call) -> float:
    """Return the milliseconds of the fastest of a few calls in a row.

    Each library has its own thread pool, whose idle threads spin for some milliseconds before they
    sleep. The pause lets those of the previous contender fall asleep. The first call wakes this
    contender's threads and fills the caches.
    """
    time.sleep(_PAUSE)
    return 1e3 * min(timeit.repeat(call, number=1, repeat=_CALLS))


def alternate(
    contenders: Mapping[str, Call],
    rounds: int,
    take_turn: Callable[[Call], float] = take_cpu_turn,
) -> dict[str, Timing]:
    """Time all contenders, with one turn each per round, after a warm-up round.

    Args:
        contenders: Functions without arguments, by name.
        rounds: Number of rounds that count.
        take_turn: Returns the milliseconds of a contender.
    """
    times = [
        {name: take_turn(call) for name, call in contenders.items()} for _ in range(1 + rounds)
    ]
    return {name: Timing(tuple(each[name] for each in times[1:])) for name in contenders}


def run_forward(operator: Operator, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return operator(*inputs)


def run_backward(
    operator: Operator, inputs: Inputs, make_grad: Callable[[Tensor], Tensor] = torch.ones_like
) -> tuple[Tensor, ...]:
    """Return the output and the gradients of the inputs that require and have one."""
    given = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
    output = operator(*given)
    leaves = [tensor for tensor in given if tensor.requires_grad]
    grads = torch.autograd.grad(output, leaves, make_grad(output), allow_unused=True)
    return output.detach(), *(grad for grad in grads if grad is not None)


def gradient_like(output: Tensor) -> Tensor:
    """Return the same random gradient for every call, in eighths, which are exact in all dtypes."""
    generator = torch.Generator().manual_seed(1)
    grad = (8 * torch.randn(output.shape, generator=generator)).round() / 8
    return grad.to(output.device, output.dtype)


def odd_sixteenths(values: Tensor) -> Tensor:
    """Round to odd sixteenths in (-4, 4), which are exact in all dtypes."""
    return ((8 * values.clamp(-3.9, 3.9)).floor() + 0.5) / 8


def relative_norm(result: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference relative to the norm of the truth."""
    difference = float((result.to(truth.device).double() - truth).norm())
    scale = float(truth.norm())
    return difference / scale if scale else difference


def worst_error(results: Sequence[Tensor], truths: Sequence[Tensor]) -> float:
    """Return the largest `relative_norm` of the results; NaN if any is NaN."""
    pairs = zip(results, truths, strict=True)
    return float(torch.tensor([relative_norm(*pair) for pair in pairs]).max())


@dataclass(frozen=True)
class Comparison:
    """Contenders that are given the same inputs.

    Attributes:
        subject: Operator and sizes, for the report.
        inputs: Tensors; those that get a gradient require one.
        reference: Computes the exact result from float64 inputs.
        checked: Contenders that must agree with the reference.
        yardsticks: Contenders that compute something similar and are not checked.
        forward_only: Checked contenders without a backward pass; called without arguments.
        tolerance: Largest relative error.
    """

    subject: str
    inputs: Inputs
    reference: Operator
    checked: Mapping[str, Operator]
    yardsticks: Mapping[str, Operator] = field(default_factory=dict)
    forward_only: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    tolerance: float = 1e-4

    def check(self) -> None:
        """Exit if a result or gradient differs from the reference."""
        doubles = tuple(tensor.double() for tensor in self.inputs)
        truths = run_backward(self.reference, doubles, gradient_like)
        results: dict[str, tuple[Tensor, ...]] = {
            name: run_backward(operator, self.inputs, gradient_like)
            for name, operator in self.checked.items()
        }
        results |= {name: (call(),) for name, call in self.forward_only.items()}
        for name, found in results.items():
            error = worst_error(found, truths[:1] if name in self.forward_only else truths)
            if not error < self.tolerance:
                raise SystemExit(f"{name} is wrong on {self.subject}: relative error {error:.2g}")

    def time(
        self, rounds: int, take_turn: Callable[[Call], float] = take_cpu_turn
    ) -> dict[str, dict[str, Timing]]:
        """Check all contenders, then return their timings by pass and name."""
        self.check()
        operators = {**self.checked, **self.yardsticks}.items()
        forward = {name: partial(run_forward, op, self.inputs) for name, op in operators}
        both = {name: partial(run_backward, op, self.inputs) for name, op in operators}
        return {
            FORWARD: alternate({**forward, **self.forward_only}, rounds, take_turn),
            BOTH: alternate(both, rounds, take_turn),
        }


def describe_machine() -> dict[str, str | int]:
    """Return the processor, the number of threads and versions."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {
        "processor": processor,
        "vector code": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def describe_gpu(device: torch.device) -> dict[str, str | int]:
    """Return the GPU, its driver, the native library, and what `describe_machine` returns."""
    if device.type != "cuda":
        gpu: dict[str, str | int] = {"device": f"{device}: a dry run; its timings have no meaning"}
    else:
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "device": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": f"{properties.total_memory / (1 << 30):.0f} GiB",
            "driver": _driver_version(),
            "CUDA of torch": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    status = native_status()
    return {
        **gpu,
        "dcnseg": __version__,
        "native": status["cuda" if device.type == "cuda" else "cpu"],
        "native build": status["build"],
        **describe_machine(),
    }


def _driver_version() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: no nvidia-smi"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0]


def make_parser(description: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options of the CPU benchmarks; `rounds` is a default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one tiny size, to test the script")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
    return parser


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; floats get three significant digits."""

    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(_cell(cell) for cell in cells)} |"

    return "\n".join([line(columns), line("---" for _ in columns), *map(line, rows)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def report(
    title: str,
    comparisons: Iterable[Comparison],
    options: argparse.Namespace,
    left_out: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Check and time all comparisons on the CPU; print rows as they finish, or one JSON object."""
    machine = {**describe_machine(), **(versions or {}), "native": native_status()["cpu"]}
    left_out = left_out or {}
    if not options.json:
        print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
        print(*(f"left out: {name}: {why}\n" for name, why in left_out.items()), sep="", end="")
        print(f"{title}; milliseconds, and multiples of {OURS}'s time")
        columns = ("median", "spread", "best", "median ratio", "best ratio")
        print(f"{'':36}", *(f"{column:>12}" for column in columns))
    rows = []
    for comparison in comparisons:
        for passed, timings in comparison.time(options.rounds).items():
            row = {"subject": comparison.subject, "pass": passed, "contenders": _numbers(timings)}
            rows.append(row)
            if not options.json:
                print(f"{comparison.subject}, {passed}")
                for name, numbers in _numbers(timings).items():
                    cells = (f"{number:12.2f}" for number in numbers.values())
                    print(f"  {name:34}", *cells, flush=True)
    if options.json:
        print(json.dumps({"machine": machine, "left_out": dict(left_out), "rows": rows}))


def _numbers(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    ours = timings[OURS]
    exact = {
        name: {
            "median": timing.median,
            "spread": timing.spread,
            "best": timing.best,
            "median_ratio": timing.ratio_to(ours),
            "best_ratio": timing.best / ours.best,
        }
        for name, timing in timings.items()
    }
    return {name: {key: round(each[key], 3) for key in each} for name, each in exact.items()}
