"""Checks that run in a process of their own.

Entry point: `make_process_checks`. Run as a program, this module is such a process: `fallback`
calls every operator twice and reports warnings; `operators` and `few_operators` call each once, for
a sanitizer.
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
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch

from dcnseg.errors import NativeOpsError
from dcnseg.ops import _native
from tests.gpu.cases import OperatorCase, make_cases, one_case_per_operator
from tests.gpu.checks import LAYOUTS, Check, move_tensors, require_close, require_gpu, synchronize
from tests.gpu.machine_code import write_for_no_gpu

ROOT = Path(__file__).parents[2]
SANITIZERS = {"memcheck": "operators", "racecheck": "few_operators"}  # tool: job
_SANITIZER_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")
_TIMEOUT = 240  # seconds


def make_process_checks(*, quick: bool) -> Iterator[Check]:
    """Yield the checks of what happens without native code."""
    yield Check("no library: one warning, right results", check_without_library)
    yield Check("no code for this GPU: one warning, right results", check_other_architecture)
    if not quick:
        yield Check("no GPU visible: native code on the CPU", check_hidden_gpu)


def make_sanitizer_checks() -> Iterator[Check]:
    for tool in SANITIZERS:
        yield Check(f"compute-sanitizer {tool}", partial(check_sanitizer, tool=tool))


def check_marked_tests(device: torch.device) -> str:
    """Run the tests marked `gpu` of the other folders."""
    require_gpu(device)
    if find_spec("pytest") is None:
        raise SkipTest("pytest is not installed")
    # A source folder earlier in the path would shadow an installed package, hence `append`.
    command = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--import-mode=append"]
    done = run_python([*command, f"--ignore={ROOT / 'tests/gpu'}", str(ROOT / "tests")])
    summary = (done.stdout.strip().splitlines() or [""])[-1]
    is_ok = done.returncode == 0 and " passed" in summary
    assert is_ok, f"{summary}\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    return summary.strip("= ")


def check_without_library(device: torch.device) -> str:
    with tempfile.TemporaryDirectory() as folder:
        reason = "uses the slower PyTorch implementation"
        return _check_fallback(device, Path(folder), reason=reason)


def check_other_architecture(device: torch.device) -> str:
    """The library loads, but its kernels are for other GPUs; only a launch fails."""
    require_gpu(device)
    source = Path(str(_native._directory()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(source / "libdcnseg_cpu.so", folder)
        library = "libdcnseg_cuda.so"
        renamed = write_for_no_gpu(source / library, folder / library)
        assert renamed, f"{library} contains no machine code"
        return _check_fallback(device, folder, reason="failed its self-test")


def _check_fallback(device: torch.device, native: Path, *, reason: str) -> str:
    found = _run_fallback(device, {"DCNSEG_NATIVE_DIR": str(native)})
    messages = found["warnings"]
    is_as_expected = len(messages) == 1 and reason in messages[0]
    assert is_as_expected, f"expected one warning with {reason!r}, found {messages}"
    assert found["refusals"] == found["operators"], 'backend="native" did not fail everywhere'
    return str(messages[0])


def check_hidden_gpu(device: torch.device) -> str:
    found = _run_fallback(torch.device("cpu"), {"CUDA_VISIBLE_DEVICES": ""})
    assert found["warnings"] == [], found
    assert found["refusals"] == 0, found
    return f"{found['operators']} operators"


def _run_fallback(device: torch.device, environment: Mapping[str, str]) -> Any:
    done = run_python(["-m", "tests.gpu.processes", "fallback", str(device)], environment)
    assert done.returncode == 0, last_lines(done.stderr)
    return json.loads(done.stdout)


def check_sanitizer(device: torch.device, tool: str) -> str:
    require_gpu(device)
    folders = os.pathsep.join([os.environ.get("PATH", ""), *_SANITIZER_FOLDERS])
    program = shutil.which("compute-sanitizer", path=folders)
    if program is None:
        raise SkipTest("compute-sanitizer is not installed")
    options = ["--tool", tool, "--error-exitcode", "99", "--print-limit", "5"]
    options += ["--report-api-errors", "no"] * (
        tool == "memcheck"
    )  # torch makes calls that may fail
    job = SANITIZERS[tool]
    child = [sys.executable, "-m", "tests.gpu.processes", job, str(device)]
    # Without torch's caching allocator, an access beyond a tensor leaves its allocation.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = run_command([program, *options, *child], environment)
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", done.stdout)
    is_clean = done.returncode == 0 and summary and re.search(r"\b0 errors", summary[-1])
    assert is_clean, last_lines(done.stdout + done.stderr, 12)
    return str(summary[-1])


def run_python(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return run_command([sys.executable, *arguments], environment)


def run_command(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with this process's module search path."""
    path = os.pathsep.join([*filter(None, sys.path), str(ROOT)])
    variables = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    try:
        return subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"took more than {_TIMEOUT} seconds") from error


def last_lines(text: str, count: int = 3) -> str:
    return " | ".join(text.strip().splitlines()[-count:])


def fallback(device: torch.device) -> dict[str, Any]:
    """Call every operator twice without native code; report the warnings and refusals."""
    cases = list(one_case_per_operator())
    refusals = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in cases:
            tensors = move_tensors(case.make(torch.float32), device, "contiguous")
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
    """Call everything once, forward and backward, with native code only."""
    return _call_once(make_cases(), LAYOUTS, device)


def few_operators(device: torch.device) -> dict[str, Any]:
    """Like `operators`, but small enough for a tool that is hundreds of times slower."""
    return _call_once(one_case_per_operator(), ["channels-last"], device)


def _call_once(
    cases: Iterable[OperatorCase], layouts: Iterable[str], device: torch.device
) -> dict[str, Any]:
    calls = list(product(cases, layouts, (torch.float32, torch.bfloat16)))
    for case, layout, dtype in calls:
        case.results(move_tensors(case.make(dtype), device, layout), "native")
    synchronize(device)
    return {"calls": len(calls)}


JOBS = {"fallback": fallback, "operators": operators, "few_operators": few_operators}

if __name__ == "__main__":
    _job, _device = sys.argv[1:]
    print(json.dumps(JOBS[_job](torch.device(_device))))
