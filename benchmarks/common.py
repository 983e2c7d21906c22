"""Timing that every benchmark shares: contenders alternate, medians and spreads are kept."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender; `rounds` in the order of the run."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

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


def alternate(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2
) -> dict[str, Timing]:
    """Time all contenders, each once per round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warm_up + rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if i >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing(tuple(each)) for name, each in times.items()}


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
        "python": platform.python_version(),
    }
