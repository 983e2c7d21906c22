"""Measure the working memory of the deformable convolution on the CPU, beside that of others.

Each number comes from a process of its own, which is asked for the peak of its resident memory.
From that are taken off what was there before the call, and what it returns: output, gradients.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_ops import DENSE, make_operators
from benchmarks.common import OURS, describe_machine, make_parser

BAR_MIB = 64  # of working memory, at any size of the image
_MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One call: what it is given, and whose and which pass it is."""

    size: tuple[int, int, int, int]  # [B, C, H, W]
    channels_last: bool
    dtype: str
    contender: str
    backward: bool
    threads: int

    def __str__(self) -> str:
        order = "channels-last" if self.channels_last else "channels-first"
        passed = "backward" if self.backward else "forward"
        return f"{list(self.size)!s:20} {self.dtype:9} {order:15} {passed:9} {self.contender}"


SIZES = ((4, 256, 128, 128), (1, 256, 200, 304), (1, 64, 1024, 1024))
QUICK_SIZES = ((1, 16, 64, 64),)


# (dtype, channels-last)
MAPS = tuple(
    (dtype, channels_last)
    for dtype in ("float32", "bfloat16", "float16")
    for channels_last in (False, True)
)


def make_plan(quick: bool, threads: int) -> Iterator[Case]:
    """All calls."""
    for size in QUICK_SIZES if quick else SIZES:
        for dtype, channels_last in MAPS[:1] if quick else MAPS:
            for backward in (False, True):
                for name in make_operators(1, getattr(torch, dtype)):
                    # Others copy channels-last first; torch's dense float16 takes minutes.
                    is_rival_left_out = dtype == "float16" or (channels_last and name != DENSE)
                    if name == OURS or not is_rival_left_out:
                        yield Case(size, channels_last, dtype, name, backward, threads)


def measure(case: Case) -> float:
    """MiB that the call needed for itself, at its peak. To be called in a fresh process."""
    torch.set_num_threads(case.threads)
    dtype = getattr(torch, case.dtype)
    operator = make_operators(1, dtype)[case.contender]
    # A small call first: the libraries set up their threads and buffers once in a process.
    run(operator, _make_inputs((1, 32, 16, 16), dtype, case.channels_last), True)
    return run(operator, _make_inputs(case.size, dtype, case.channels_last), case.backward)


def run(
    operator: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, ...],
    backward: bool,
) -> float:
    """MiB beyond the inputs and what a call of `operator` returns: output, or gradients, too."""
    grad = torch.ones_like(inputs[0])  # of the output, which is like the input
    leaves = [tensor.requires_grad_(backward) for tensor in inputs]
    before = _resident()
    _forget_peak()
    output = operator(*leaves)
    returned = _bytes(output)
    if backward:  # what the forward keeps for it counts, too
        _forget_peak()
        output.backward(grad)
        returned += sum(_bytes(leaf.grad) for leaf in leaves if leaf.grad is not None)
    return (_peak() - before - returned) / _MIB


def _make_inputs(
    size: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool
) -> tuple[Tensor, ...]:
    """Input, offset and weight, written to, so that all their memory is resident."""
    torch.manual_seed(0)
    batch, channels, height, width = size
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.empty(size, dtype=dtype, memory_format=memory_format).normal_()
    offset = torch.empty(batch, 18, height, width).normal_()
    weight = torch.empty(channels, channels, 3, 3, dtype=dtype, memory_format=memory_format)
    return input, offset, weight.normal_().mul_(0.02)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    """An entry of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _forget_peak() -> None:
    """Let the kernel count the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser(__doc__).parse_args(arguments)
    machine = describe_machine() | {"threads": options.threads}
    if not options.json:
        print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
        print(f"MiB beyond input and result; the bar for {OURS} is {BAR_MIB}")
    # Each process is forked from one that has imported torch, and has done nothing with it yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.bench_memory"])
    rows = []
    for case in make_plan(options.quick, options.threads):
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            mebibytes = round(process.submit(measure, case).result(), 1)
        rows.append({**asdict(case), "mebibytes": mebibytes})
        if not options.json:
            print(f"{case!s:75} {mebibytes:9.1f}", flush=True)
    if options.json:
        print(json.dumps({"machine": machine, "bar_mebibytes": BAR_MIB, "rows": rows}))


if __name__ == "__main__":
    main()
