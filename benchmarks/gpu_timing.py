"""Time, memory and kernels of calls on a GPU, and the GPU's measured limits.

Entry points: `GpuClock`, `peak_memory`, `measure_ceilings`, `kernel_shares`. On the CPU, for dry
runs, the numbers have no meaning.
"""

from __future__ import annotations

import timeit
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Call

_SLEEP_CYCLES = 20_000_000  # about 10 ms, in which all calls of a turn are queued
_MIB = 1 << 20


@dataclass(frozen=True)
class GpuClock:
    """Measures the milliseconds of a call with CUDA events: the mean over a turn of several calls.

    The GPU sleeps while a turn is queued. This measures the time of the GPU and not of Python, as
    in a program that queues work ahead of the GPU.

    Attributes:
        device: The device of the calls.
        calls: Number of calls in a turn. A call that rotates over inputs uses each once per turn.
    """

    device: torch.device
    calls: int

    def __call__(self, call: Call) -> float:
        """Run one turn."""
        if self.device.type != "cuda":
            return 1e3 * timeit.timeit(call, number=self.calls) / self.calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        for _ in range(self.calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / self.calls


def peak_memory(call: Call, device: torch.device) -> float | None:
    """Return the peak GPU memory of a call in MiB, including its result; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del kept
    return (peak - before) / _MIB


def measure_ceilings(
    device: torch.device, dtypes: tuple[str, ...], quick: bool
) -> dict[str, float]:
    """Return TFLOP/s of a large GEMM by dtype, and TB/s read and written as "copy"."""
    on_gpu = device.type == "cuda" and not quick
    size, copied = (8192, 1 << 31) if on_gpu else (64, 1 << 16)
    clock = GpuClock(device, calls=5)

    def best(call: Call) -> float:
        return min(clock(call) for _ in range(4))

    ceilings = {}
    for dtype in dtypes:
        factors = [torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in "ab"]
        ceilings[dtype] = 2 * size**3 / best(partial(torch.matmul, *factors)) / 1e9
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ceilings["copy"] = 2 * copied / best(lambda: target.copy_(source)) / 1e9
    return ceilings


def kernel_shares(call: Call, device: torch.device, calls: int = 5) -> list[dict[str, Any]]:
    """Return name, calls, milliseconds per call and share of every kernel, the longest first."""
    is_gpu = device.type == "cuda"
    call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu
    with profile(activities=activities, acc_events=True) as recorded:
        for _ in range(calls):
            call()
        if is_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if is_gpu else DeviceType.CPU
    time_name = f"self_{'device' if is_gpu else 'cpu'}_time_total"
    found = [
        (event.key, event.count, float(getattr(event, time_name)))
        for event in recorded.key_averages()
        if event.device_type == kind
    ]
    total = sum(microseconds for _, _, microseconds in found) or 1
    return [
        {
            "kernel": name[:100],
            "calls": count / calls,
            "milliseconds": microseconds / calls / 1e3,
            "share": microseconds / total,
        }
        for name, count, microseconds in sorted(found, key=lambda each: -each[2])
    ]
