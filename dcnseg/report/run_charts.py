"""Keeps the charts of a run up to date while it trains; entry point `keep_report`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from dcnseg.engine.listener import RunSummary, TrainingListener
from dcnseg.processes import this_process
from dcnseg.report.run_report import write_run_charts, write_run_report

INTERVAL_SECONDS: Final = 60.0  # between two drawings, which take a second


@contextmanager
def keep_report(run: Path, listener: TrainingListener) -> Iterator[TrainingListener]:
    """Yield a listener for training `run` that draws its charts and passes everything on.

    At the end, also of an interrupted run, the charts are drawn once more; a run that ends well
    gets its report, too. A chart that cannot be drawn is a warning, as the run is more important.
    Of several processes, only the main one draws.
    """
    if not this_process().is_main:
        yield listener
        return
    writer = ChartWriter(run, listener)
    try:
        yield writer
    finally:
        writer.draw()
    _warn_if_it_fails(listener, f"The report of {run}", lambda: write_run_report(run))


class ChartWriter(TrainingListener):
    """Draws the charts of a run at most once a minute, and passes everything to `listener`."""

    def __init__(self, run: Path, listener: TrainingListener) -> None:
        self._run = run
        self._listener = listener
        self._drawn_at = time.monotonic()
        self._has_started = False
        self.checking = listener.checking  # type: ignore[method-assign]
        self.step_done = listener.step_done  # type: ignore[method-assign]
        self.stopped_early = listener.stopped_early  # type: ignore[method-assign]
        self.stop_requested = listener.stop_requested  # type: ignore[method-assign]
        self.noted = listener.noted  # type: ignore[method-assign]
        self.warned = listener.warned  # type: ignore[method-assign]

    def draw(self) -> None:
        """Draw the charts, if the run has begun."""
        self._drawn_at = time.monotonic()
        if self._has_started:
            what = f"A chart of {self._run}"
            _warn_if_it_fails(self._listener, what, lambda: write_run_charts(self._run))

    def started(self, summary: RunSummary) -> None:
        """Note that the run has begun, and pass on."""
        self._has_started = True
        self._listener.started(summary)

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        """Draw the charts if it is time, and pass on."""
        if time.monotonic() - self._drawn_at >= INTERVAL_SECONDS:
            self.draw()
        self._listener.epoch_done(record, is_best=is_best)


def _warn_if_it_fails(listener: TrainingListener, what: str, write: Callable[[], object]) -> None:
    try:
        write()
    except Exception as error:  # whatever it is, the run is more important
        listener.warned(f"{what} could not be written: {error}")
