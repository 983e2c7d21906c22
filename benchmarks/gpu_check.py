"""Check the CUDA operators on the GPU of this machine, and print PASS or FAIL for each thing.

The exit status is 0 where nothing failed, else 1. What cannot be checked here is left out, with the
reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import describe_gpu
from benchmarks.gpu.checks import Check, CheckFailedError, CheckLeftOutError, make_checks
from benchmarks.gpu.child_checks import make_child_checks
from benchmarks.gpu.large_checks import make_large_checks

PASSED, FAILED, LEFT_OUT = "PASS", "FAIL", "left out"


@dataclass(frozen=True)
class Outcome:
    """One line of the report."""

    name: str
    status: str
    detail: str
    seconds: float


def select_checks(*, quick: bool, sanitizer: bool, only: str) -> Iterator[Check]:
    """All checks whose name contains `only`."""
    checks = [*make_checks(quick=quick), *make_large_checks()]
    checks += make_child_checks(sanitizer=sanitizer, quick=quick)
    return (check for check in checks if only in check.name)


def run_check(check: Check, device: torch.device) -> Outcome:
    """Run one check; an error that nobody expected fails it as well."""
    started = time.perf_counter()
    try:
        status, detail = PASSED, check.run(device)
    except CheckLeftOutError as error:
        status, detail = LEFT_OUT, str(error)
    except CheckFailedError as error:
        status, detail = FAILED, str(error)
    except Exception as error:  # the other checks still have something to say
        status, detail = FAILED, f"{type(error).__name__}: {error}"
    return Outcome(check.name, status, detail, round(time.perf_counter() - started, 2))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (a dry run)")
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--sanitizer", action="store_true", help="memcheck and racecheck, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file, too")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --device cpu tries the checks on the CPU")
    # Without it torch's products refuse to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    machine = describe_gpu(device)
    if not options.json:
        print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n", flush=True)
    outcomes = []
    for check in select_checks(quick=options.quick, sanitizer=options.sanitizer, only=options.only):
        outcome = run_check(check, device)
        outcomes.append(outcome)
        if not options.json:
            first_line = outcome.detail.partition("\n")[0]
            head = f"{outcome.status:8} {outcome.seconds:6.1f} s"
            print(f"{head}  {outcome.name}: {first_line}", flush=True)
    counts = {
        status: sum(outcome.status == status for outcome in outcomes)
        for status in (PASSED, FAILED, LEFT_OUT)
    }
    report = {"machine": machine, "counts": counts, "checks": [*map(asdict, outcomes)]}
    if options.out:
        options.out.write_text(json.dumps(report))
    if options.json:
        print(json.dumps(report))
    else:
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts[FAILED] or not counts[PASSED] else 0


if __name__ == "__main__":
    sys.exit(main())
