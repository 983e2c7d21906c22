"""What every benchmark shares: fair turns, medians and ratios, the machine, the printed report."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torchvision
from torch import Tensor

from dcnseg import __version__
from dcnseg.ops import native_status

Operator: TypeAlias = Callable[..., Tensor]

OURS = "dcnseg"  # its contender in every table, and what the ratios are relative to

_CALLS = 3  # of a contender in one turn
_PAUSE = 0.02  # seconds before a turn


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender: of each round its fastest call, in the order of the run."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        return min(self.rounds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        if len(self.rounds) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.rounds, n=4)
        return (upper - lower) / 2

    def ratio_to(self, other: Timing) -> float:
        """Median of the ratios of rounds that ran one after the other."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def best_ratio_to(self, other: Timing) -> float:
        return self.best / other.best


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    take_turn: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Time all contenders, each in one turn per round, after a round that is not counted.

    Args:
        contenders: What to call, by name.
        rounds: How many turns of each count.
        take_turn: Gives the milliseconds of a contender; None: those of the CPU.
    """
    take_turn = take_turn or _take_turn
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(1 + rounds):
        for name, call in contenders.items():
            milliseconds = take_turn(call)
            if i > 0:
                times[name].append(milliseconds)
    return {name: Timing(tuple(each)) for name, each in times.items()}


def time_passes(
    operators: Mapping[str, Operator],
    backward: Callable[[Operator, tuple[Tensor, ...]], object],
    inputs: tuple[Tensor, ...],
    rounds: int,
    forward_only: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, dict[str, Timing]]:
    """Timings by pass and contender.

    Args:
        operators: What is called with all inputs, by name.
        backward: Runs an operator on the inputs, forward and backward.
        inputs: Tensors of one subject.
        rounds: As in `alternate`.
        forward_only: Contenders without a backward, by name; called with nothing.
    """

    def forward(operator: Operator) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return operator(*inputs)

        return call

    def both(operator: Operator) -> Callable[[], object]:
        return lambda: backward(operator, inputs)

    forwards = {name: forward(operator) for name, operator in operators.items()}
    return {
        "forward": alternate({**forwards, **(forward_only or {})}, rounds),
        "forward+backward": alternate({name: both(op) for name, op in operators.items()}, rounds),
    }


def _take_turn(call: Callable[[], object]) -> float:
    """Milliseconds of the fastest of a few calls in a row.

    The libraries have a pool of threads each, and threads without work keep a core busy for some
    milliseconds before they sleep. The pause lets those of the contender before fall asleep; the
    first call wakes this one's, and brings its data into the caches.
    """
    time.sleep(_PAUSE)
    milliseconds = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        call()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return min(milliseconds)


def describe_machine() -> dict[str, str | int]:
    """Processor, threads and versions, to be printed with every table."""
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
    """Device, driver, versions and the native library, to be printed with all that a GPU did."""
    if device.type != "cuda":
        gpu: dict[str, str | int] = {"device": f"{device}: a dry run, of which no figure counts"}
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


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one tiny size: does it all work?")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers that are not whole get as many digits as they deserve."""

    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(_cell(cell) for cell in cells)} |"

    return "\n".join([line(columns), line("---" for _ in columns), *map(line, rows)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def relative_error(result: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest true value."""
    return float((result.double() - truth).abs().max() / truth.abs().max())


class Report:
    """Prints timings as they come, or everything as one JSON object in the end."""

    def __init__(
        self,
        title: str,
        machine: Mapping[str, str | int],
        left_out: Mapping[str, str],
        *,
        as_json: bool,
    ) -> None:
        self._machine = dict(machine)
        self._left_out = dict(left_out)
        self._rows: list[dict[str, object]] = []
        self._as_json = as_json
        if not as_json:
            print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
            for name, why in left_out.items():
                print(f"left out: {name}: {why}")
            print(f"{title}; milliseconds, and how many times those of {OURS}")
            columns = ("median", "spread", "best", "median ratio", "best ratio")
            print(f"{'':36}", *(f"{column:>12}" for column in columns))

    def add(self, subject: str, passed: str, timings: Mapping[str, Timing]) -> None:
        """Take the timings of one table: all contenders in one pass over one subject."""
        ours = timings[OURS]
        contenders = {
            name: {
                "median": round(timing.median, 3),
                "spread": round(timing.spread, 3),
                "best": round(timing.best, 3),
                "median_ratio": round(timing.ratio_to(ours), 3),
                "best_ratio": round(timing.best_ratio_to(ours), 3),
            }
            for name, timing in timings.items()
        }
        self._rows.append({"subject": subject, "pass": passed, "contenders": contenders})
        if not self._as_json:
            print(f"{subject}, {passed}")
            for name, numbers in contenders.items():
                cells = (f"{number:12.2f}" for number in numbers.values())
                print(f"  {name:34}", *cells, flush=True)

    def finish(self) -> None:
        if self._as_json:
            whole = {"machine": self._machine, "left_out": self._left_out, "rows": self._rows}
            print(json.dumps(whole))
