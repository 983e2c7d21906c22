"""One run of the comparison on CamVid by the command line, and the file of results.

Entry points: `commands`, `run_job`, `Results`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.camvid.plan import Job
from benchmarks.common import describe_gpu
from dcnseg.device import select_device
from dcnseg.engine.metrics import read_metrics
from dcnseg.files import atomic_path

# As the command `dcnseg`, wherever that was installed.
_DCNSEG = [sys.executable, "-c", "from dcnseg_cli.main import main; main()"]
AUGMENTED_SCALES = "1,1.5"  # of the second score on test, mirrored as well
_KEPT_METRICS = ("epoch", "loss", "images_per_second", "mean_iou", "seconds")
_POLL_SECONDS = 0.2


class RunFailedError(Exception):
    """A run broke off, or the time was up."""


class HasSecondsLeft(Protocol):
    """When to stop."""

    @property
    def seconds_left(self) -> float:
        """Seconds until then."""


@dataclass
class Results:
    """The finished runs, in memory and in a file."""

    path: Path
    parallel: int
    workers: int
    device: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def read(cls, path: Path, options: argparse.Namespace) -> Results:
        """What former calls have left in the file, if there is one."""
        runs = json.loads(path.read_text())["runs"] if path.is_file() else []
        return cls(path, options.parallel, options.workers, options.device, runs)

    def append(self, run: dict[str, Any]) -> None:
        """Add a finished run; the file is whole at every moment."""
        with self._lock:
            self.runs.append(run)
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps({"runs": self.runs}, indent=1))

    def summary(self, name: str) -> str:
        """The scores of a run in a few words."""
        (run,) = (run for run in self.runs if run["name"] == name)
        parts = (part for part in ("val", "test", "test_augmented") if run[part])
        scores = {part: run[part]["mean_iou"] for part in parts}
        return f"{scores} in {run['seconds']:.0f} s"


def commands(job: Job, data: Path, runs: Path, results: Results) -> list[list[str]]:
    """What a reader would type to repeat the run: train, then score it on test, if it is final."""
    folder = str(runs / job.name)
    machine = ["--device", results.device, "--workers", str(results.workers)]
    made = [["dcnseg", "train", str(data), "--out", folder, *job.options(), *machine]]
    if job.phase == "final":
        score = ["dcnseg", "evaluate", folder, str(data), "--split", "test", "--json"]
        score += ["--device", results.device]
        made += [score, [*score, "--flip", "--scales", AUGMENTED_SCALES]]
    return made


def _environment(results: Results) -> dict[str, str]:
    """Of a command: the cores that its loading processes leave, shared by all runs."""
    cores = (os.cpu_count() or 1) // results.parallel - results.workers
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, cores))}


def run_job(job: Job, data: Path, runs: Path, results: Results, deadline: HasSecondsLeft) -> None:
    """Run the commands one after the other, and append what they found.

    Raises:
        RunFailedError: a command failed or the time was up; nothing is appended.
    """
    started = time.monotonic()
    runs.mkdir(parents=True, exist_ok=True)
    folder = runs / job.name
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was cut off
    made = commands(job, data, runs, results)
    call = partial(_call, deadline=deadline, environment=_environment(results))
    call(made[0])
    with ThreadPoolExecutor() as pool:  # starting the program takes longer than the scores
        tests = [json.loads(output) for output in pool.map(call, made[1:])]
    metrics = read_metrics(folder)
    scored = [record for record in metrics if record.get("mean_iou") is not None]
    best = max(scored, key=lambda record: float(record["mean_iou"]))
    results.append(
        {
            "name": job.name,
            **asdict(job),
            "parallel": results.parallel,
            "seconds": round(time.monotonic() - started, 1),
            # With the names that a reader's folders may have.
            "commands": commands(job, Path("camvid"), Path("runs"), results),
            "val": best,
            "test": tests[0] if tests else None,
            "test_augmented": tests[1] if tests else None,
            "metrics": [_few(record) for record in metrics],
            "machine": describe_gpu(select_device(results.device)),
            "torch": torch.__version__,
        }
    )
    (folder / "last.ckpt").unlink(missing_ok=True)  # larger than all the rest


def _few(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in _KEPT_METRICS if name in record}


def _call(command: list[str], deadline: HasSecondsLeft, environment: dict[str, str]) -> str:
    """The standard output of a command that is ended when the time is up."""
    process = subprocess.Popen(
        [*_DCNSEG, *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=max(_POLL_SECONDS, deadline.seconds_left))
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise RunFailedError("the time was up") from error
    if process.returncode:
        raise RunFailedError(" | ".join(errors.strip().splitlines()[-3:]))
    return output
