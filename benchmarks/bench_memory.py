"""Measure the working memory of the deformable convolution on the CPU, with others beside it.

Each call runs in a process of its own. Its working memory is the peak of the resident memory, less
what was resident before the call and less what it returns: output and gradients.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_ops import DENSE, TORCHVISION, make_operators
from benchmarks.common import OURS, Inputs, Operator, describe_machine, make_parser

BAR_MIB = 64  # limit of dcnseg's working memory, for any image size
_MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One call of one contender."""

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
DTYPES = ("float32", "bfloat16", "float16")


def make_cases(quick: bool, threads: int) -> Iterator[Case]:
    formats = [(dtype, is_last) for dtype in DTYPES for is_last in (False, True)]
    for size in QUICK_SIZES if quick else SIZES:
        for dtype, channels_last in formats[:1] if quick else formats:
            for backward in (False, True):
                for name in (DENSE, OURS, TORCHVISION):
                    if _is_measured(name, dtype, channels_last):
                        yield Case(size, channels_last, dtype, name, backward, threads)


def _is_measured(name: str, dtype: str, channels_last: bool) -> bool:
    if name == OURS:
        return True
    if name == DENSE:
        return dtype != "float16"  # takes minutes
    return dtype == "float32" and not channels_last  # torchvision copies channels-last inputs


def measure(case: Case) -> float:
    """Return the working memory of a call in MiB; call this in a fresh process."""
    torch.set_num_threads(case.threads)
    dtype = getattr(torch, case.dtype)
    operator = make_operators(1)[case.contender]
    # Libraries set up their threads and buffers in the first call of a process.
    run(operator, _make_inputs((1, 32, 16, 16), dtype, case.channels_last), True)
    return run(operator, _make_inputs(case.size, dtype, case.channels_last), case.backward)


def run(operator: Operator, inputs: Inputs, backward: bool) -> float:
    """Return MiB beyond the inputs and the result: the output, and gradients if `backward`."""
    grad = torch.ones_like(inputs[0])  # the output has the shape of the input
    leaves = [tensor.requires_grad_(backward) for tensor in inputs]
    before = _read_status("VmRSS")
    _reset_peak()
    output = operator(*leaves)
    returned = _bytes(output)
    if backward:  # includes what the forward keeps for it
        _reset_peak()
        output.backward(grad)
        returned += sum(_bytes(leaf.grad) for leaf in leaves if leaf.grad is not None)
    return (_read_status("VmHWM") - before - returned) / _MIB


def _make_inputs(
    size: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool
) -> Inputs:
    """Return input, offset and weight, filled in place so that all their memory is resident."""
    torch.manual_seed(0)
    batch, channels, height, width = size
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.empty(size, dtype=dtype, memory_format=memory_format).normal_()
    offset = torch.empty(batch, 18, height, width).normal_()
    weight = torch.empty(channels, channels, 3, 3, dtype=dtype, memory_format=memory_format)
    return input, offset, weight.normal_().mul_(0.02)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _read_status(name: str) -> int:
    """Return an entry of the process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _reset_peak() -> None:
    """Reset VmHWM to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser(__doc__).parse_args(arguments)
    machine = describe_machine() | {"threads": options.threads}
    if not options.json:
        print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
        print(f"MiB beyond inputs and result; the limit for {OURS} is {BAR_MIB}")
    # Each process is forked from one that has imported torch but not used it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.bench_memory"])
    rows = []
    for case in make_cases(options.quick, options.threads):
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            mebibytes = round(process.submit(measure, case).result(), 1)
        rows.append({**asdict(case), "mebibytes": mebibytes})
        if not options.json:
            print(f"{case!s:75} {mebibytes:9.1f}", flush=True)
    if options.json:
        print(json.dumps({"machine": machine, "bar_mebibytes": BAR_MIB, "rows": rows}))


if __name__ == "__main__":
    main()
