"""Check the CUDA operators on this machine's GPU, without pytest.

Prints PASS, FAIL or "left out" for each check, or one JSON object. The exit status is 0 if at least
one check passed and none failed, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch

from benchmarks.common import describe_gpu
from tests.gpu.checks import Check, make_checks
from tests.gpu.large import make_large_checks
from tests.gpu.processes import check_marked_tests, make_process_checks, make_sanitizer_checks

PASSED, FAILED, SKIPPED = "PASS", "FAIL", "left out"


def select_checks(*, quick: bool, sanitizer: bool, only: str) -> list[Check]:
    """Return the checks whose name contains `only`."""
    checks = [*make_checks(quick=quick), *make_large_checks(), *make_process_checks(quick=quick)]
    if not quick:
        checks.append(Check("tests marked gpu", check_marked_tests))
    if sanitizer:
        checks += make_sanitizer_checks()
    return [check for check in checks if only in check.name]


def run_check(check: Check, device: torch.device) -> dict[str, Any]:
    """Run a check; any exception except a skip is a failure."""
    started = time.perf_counter()
    try:
        status, detail = PASSED, check.run(device)
    except SkipTest as error:
        status, detail = SKIPPED, str(error)
    except AssertionError as error:
        status, detail = FAILED, str(error)
    except Exception as error:
        status, detail = FAILED, f"{type(error).__name__}: {error}"
    seconds = round(time.perf_counter() - started, 2)
    return {"name": check.name, "status": status, "detail": detail, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a dry run")
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind")
    parser.add_argument("--only", default="", help="only checks whose name contains this")
    parser.add_argument("--sanitizer", action="store_true", help="also run memcheck and racecheck")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU found; use --device cpu for a dry run")
    machine = describe_gpu(device)
    if not options.json:
        print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n", flush=True)
    outcomes = []
    for check in select_checks(quick=options.quick, sanitizer=options.sanitizer, only=options.only):
        outcome = run_check(check, device)
        outcomes.append(outcome)
        if not options.json:
            first_line = outcome["detail"].partition("\n")[0]
            head = f"{outcome['status']:8} {outcome['seconds']:6.1f} s"
            print(f"{head}  {check}: {first_line}", flush=True)
    found = [outcome["status"] for outcome in outcomes]
    counts = {status: found.count(status) for status in (PASSED, FAILED, SKIPPED)}
    report = {"machine": machine, "counts": counts, "checks": outcomes}
    if options.out:
        options.out.write_text(json.dumps(report))
    if options.json:
        print(json.dumps(report))
    else:
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if counts[FAILED] or not counts[PASSED] else 0


if __name__ == "__main__":
    sys.exit(main())
