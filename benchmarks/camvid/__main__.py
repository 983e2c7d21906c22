"""Train DeepLabV3+ on CamVid from scratch: plain, with fixed dilations, and deformable.

Every run is a `dcnseg train` and some `dcnseg evaluate`, whose commands are printed and kept. A
finished run is appended to the results at once, and is not repeated by the next call: so several
calls add up. Nothing is started that would not be finished in the given minutes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.camvid.plan import RECIPES, Job, Plan
from benchmarks.camvid.report import curves_svg, fill_page, to_markdown
from benchmarks.camvid.run import Results, RunFailedError, commands, run_job


class Deadline:
    """The minutes that a call may take."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()


def expected_seconds(job: Job, results: Results, guess: float) -> float:
    """How long runs like it took; `guess` until there is one. The slowest counts."""
    alike = [
        run["seconds"]
        for run in results.runs
        if (run["recipe"], run["epochs"], run["parallel"])
        == (job.recipe, job.epochs, results.parallel)
    ]
    return 1.1 * max(alike) if alike else guess


def run_all(
    plan: Plan, results: Results, data: Path, runs: Path, deadline: Deadline, guess: float
) -> int:
    """Take what is open, several at a time, until all is done or the time is up.

    Returns: how many runs failed.
    """
    waiting: dict[Future[None], Job] = {}
    failed: set[str] = set()
    with ThreadPoolExecutor(results.parallel) as pool:
        while True:
            busy = {job.name for job in waiting.values()}
            for job in plan.open_jobs(results.runs):
                if len(waiting) == results.parallel:
                    break
                if job.name in busy | failed:
                    continue
                if expected_seconds(job, results, guess) > deadline.seconds_left:
                    break  # those behind it are not to overtake it
                say(f"starts {job.name}, {deadline.seconds_left:.0f} s left")
                for command in commands(job, data, runs, results):
                    say(f"  {shlex.join(command)}")
                waiting[pool.submit(run_job, job, data, runs, results, deadline)] = job
                busy.add(job.name)
            if not waiting:
                return len(failed)
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                job = waiting.pop(future)
                try:
                    future.result()
                    say(f"finished {job.name}: {results.summary(job.name)}")
                except RunFailedError as error:
                    failed.add(job.name)
                    say(f"failed {job.name}: {error}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser("python -m benchmarks.camvid", description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="CamVid's folder; none: report only")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to add to")
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid"), help="run folders")
    parser.add_argument("--minutes", type=float, default=60.0, help="of this call")
    parser.add_argument("--guess", type=float, default=240.0, help="seconds of the first run")
    parser.add_argument("--parallel", type=int, default=4, help="runs at a time")
    parser.add_argument("--workers", type=int, default=3, help="loading processes of a run")
    parser.add_argument("--recipe", choices=RECIPES, default=next(iter(RECIPES)))
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--search", default="", help="compare these recipes on val: A,B,C or all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a network and images for a dry run")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    results = Results.read(options.results, options)
    search = tuple(RECIPES if options.search == "all" else filter(None, options.search.split(",")))
    unknown = set(search) - set(RECIPES)
    if unknown:
        parser.error(f"--search: there is no {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    plan = Plan(options.recipe, options.epochs, options.seeds, search, options.tiny)
    num_failed = 0
    if options.data is not None:
        deadline = Deadline(options.minutes)
        num_failed = run_all(plan, results, options.data, options.runs, deadline, options.guess)
    still_open = [job.name for job in plan.open_jobs(results.runs)]
    tables = to_markdown(results.runs)
    print(tables)
    print(f"open: {', '.join(still_open) or 'nothing'}")
    if options.page:
        image = options.page.with_suffix(".svg")
        image.write_text(curves_svg(results.runs))
        fill_page(options.page, f"{tables}\n\n![mIoU on val]({image.name})")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
