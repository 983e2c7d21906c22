"""What `gpu_check.py` runs in processes of their own.

Entry point: `make_child_checks`. Started as a program, this is what such a process does: `fallback`
calls every operator twice and reports how; `operators` and `few_operators` call them once, for a
sanitizer to watch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.checks import (
    LAYOUTS,
    Check,
    CheckFailedError,
    CheckLeftOutError,
    moved_to,
    need_gpu,
    require_close,
)
from benchmarks.gpu.operator_cases import OperatorCase, make_cases, one_case_per_operator
from benchmarks.gpu.other_architecture import write_for_no_gpu
from dcnseg.errors import NativeOpsError
from dcnseg.ops import _native

ROOT = Path(__file__).parents[2]
SANITIZERS = {"memcheck": "operators", "racecheck": "few_operators"}  # and what they watch
_SANITIZER_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
_TIMEOUT = 240  # seconds


def make_child_checks(*, sanitizer: bool, quick: bool) -> Iterator[Check]:
    """The tests marked `gpu`, what happens without native code, and the sanitizers."""
    if not quick:
        yield Check("tests marked gpu", check_tests)
    yield Check("no library: one warning, right results", check_without_library)
    yield Check("no code for this GPU: one warning, right results", check_other_architecture)
    if not quick:
        yield Check("no GPU visible: the CPU is served", check_hidden_gpu)
    for tool in SANITIZERS if sanitizer else ():
        yield Check(f"compute-sanitizer {tool}", partial(check_sanitizer, tool=tool))


def check_tests(device: torch.device) -> str:
    need_gpu(device)
    if not (ROOT / "tests").is_dir():
        raise CheckLeftOutError("the tests are not beside the benchmarks")
    # Not by their path alone: a source folder before an installed package would shadow it.
    command = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--import-mode=append"]
    done = run_child([*command, str(ROOT / "tests")])
    summary = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or " passed" not in summary:
        raise CheckFailedError(f"{summary}\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}")
    return summary.strip("= ")


def check_without_library(device: torch.device) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return _check_fallback(device, Path(folder), reason="takes the slower PyTorch code")


def check_other_architecture(device: torch.device) -> str:
    """The library is there, but its kernels are for other GPUs: only a launch shows that."""
    need_gpu(device)
    source = Path(str(_native._directory()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(source / "libdcnseg_cpu.so", folder)
        library = "libdcnseg_cuda.so"
        renamed = write_for_no_gpu(source / library, folder / library)
        if not renamed:
            raise CheckFailedError(f"{library} holds no machine code")
        return _check_fallback(device, folder, reason="failed its self-test")


def _check_fallback(device: torch.device, native: Path, *, reason: str) -> str:
    told = _run_and_parse(device, {"DCNSEG_NATIVE_DIR": str(native)})
    if len(told["warnings"]) != 1 or reason not in told["warnings"][0]:
        raise CheckFailedError(f"expected one warning that says {reason!r}: {told['warnings']}")
    if told["refusals"] != told["operators"]:
        raise CheckFailedError('backend="native" was not refused everywhere')
    return str(told["warnings"][0])


def check_hidden_gpu(device: torch.device) -> str:
    told = _run_and_parse(torch.device("cpu"), {"CUDA_VISIBLE_DEVICES": ""})
    if told["warnings"] or told["refusals"]:
        raise CheckFailedError(f"not served by native code: {told}")
    return f"{told['operators']} operators"


def _run_and_parse(device: torch.device, environment: Mapping[str, str]) -> Any:
    done = run_child(["-m", "benchmarks.gpu.child_checks", "fallback", str(device)], environment)
    if done.returncode:
        raise CheckFailedError(last_lines(done.stderr))
    return json.loads(done.stdout)


def check_sanitizer(device: torch.device, tool: str) -> str:
    need_gpu(device)
    places = os.pathsep.join([os.environ.get("PATH", ""), *_SANITIZER_PLACES])
    program = shutil.which("compute-sanitizer", path=places)
    if program is None:
        raise CheckLeftOutError("compute-sanitizer is not installed")
    options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "5"]
    options += ["--report-api-errors", "no"] * (tool == "memcheck")  # torch asks what may fail
    job = SANITIZERS[tool]
    child = [sys.executable, "-m", "benchmarks.gpu.child_checks", job, str(device)]
    # Without torch's own allocator every tensor ends where its memory does.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = run_command([program, *options, *child], environment)
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", done.stdout)
    if done.returncode or not summary or not re.search(r"\b0 errors", summary[-1]):
        raise CheckFailedError(last_lines(done.stdout + done.stderr, 12))
    return str(summary[-1])


def run_child(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, which finds the modules that this process finds."""
    return run_command([sys.executable, *arguments], environment)


def run_command(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    search = {"PYTHONPATH": os.pathsep.join([path, str(ROOT)])}
    try:
        return subprocess.run(
            command,
            env={**os.environ, **search, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailedError(f"took more than {_TIMEOUT} seconds") from error


def last_lines(text: str, count: int = 3) -> str:
    return " | ".join(text.strip().splitlines()[-count:])


def fallback(device: torch.device) -> dict[str, Any]:
    """Call every operator twice where there should be no native code, and tell what happened."""
    cases = list(one_case_per_operator())
    refusals = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in cases:
            tensors = moved_to(case.make(torch.float32), device, "contiguous")
            expected = case.results(tensors, "reference")
            for _ in range(2):
                require_close(case.results(tensors, "auto"), expected)
            try:
                case.results(tensors, "native")
            except NativeOpsError:
                refusals += 1
    own = [str(each.message) for each in caught if str(each.message).startswith("dcnseg")]
    return {"operators": len(cases), "warnings": own, "refusals": refusals}


def operators(device: torch.device) -> dict[str, Any]:
    """Call everything once, forward and backward, with nothing of ours but the native code."""
    return _call_once(make_cases(), LAYOUTS, device)


def few_operators(device: torch.device) -> dict[str, Any]:
    """As `operators`, what a tool can watch that makes everything hundreds of times slower."""
    return _call_once(one_case_per_operator(), ["channels-last"], device)


def _call_once(
    cases: Iterable[OperatorCase], layouts: Iterable[str], device: torch.device
) -> dict[str, Any]:
    count = 0
    for case, layout, dtype in product(cases, layouts, (torch.float32, torch.bfloat16)):
        case.results(moved_to(case.make(dtype), device, layout), "native")
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"calls": count}


JOBS = {"fallback": fallback, "operators": operators, "few_operators": few_operators}

if __name__ == "__main__":
    _job, _device = sys.argv[1:]
    print(json.dumps(JOBS[_job](torch.device(_device))))
