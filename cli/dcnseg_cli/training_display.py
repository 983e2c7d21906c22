"""Shows a running training: a live display on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
)

from dcnseg.engine.listener import RunSummary, Step, TrainingListener
from dcnseg.errors import TrainingStoppedError
from dcnseg.processes import this_process
from dcnseg_cli.console import open_console
from dcnseg_cli.reporting import is_signalled, postponed_signals, raise_if_signalled
from dcnseg_cli.terminal_text import escape_message

PLAIN_INTERVAL_SECONDS = 30.0


@contextmanager
def training_display() -> Iterator[TrainingListener]:
    """Yield a listener that suits stderr; the terminal is restored at the end.

    Once training has started, the first signal lets it finish its step and save a checkpoint.
    """
    console = open_console(stderr=True)
    with ExitStack() as stack:
        if not this_process().is_main:
            listener: TrainingListener = SilentDisplay(stack)
        elif console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            progress = Progress(*columns, console=console, expand=True)
            listener = LiveDisplay(stack.enter_context(progress), stack)
        else:
            listener = PlainDisplay(console, stack)
        try:
            yield listener
        except TrainingStoppedError:
            raise_if_signalled()
            raise


class StoppableDisplay(TrainingListener):
    """Common base of the displays: stopping after a step, and lines of text.

    Args:
        stack: Closed when the display ends; from the start of training until then the first signal
            only requests a stop. None: signals are not handled.
    """

    def __init__(self, stack: ExitStack | None) -> None:
        self._stack = stack
        self._epochs = 0
        self._has_announced_stop = False

    def started(self, summary: RunSummary) -> None:
        """Print a summary of the run."""
        self._epochs = summary.epochs
        if self._stack is not None:
            self._stack.enter_context(postponed_signals())
        self.print(describe_run(summary))

    def stop_requested(self) -> bool:
        """Whether a signal has been received; announces it once."""
        if is_signalled() and not self._has_announced_stop:
            self._has_announced_stop = True
            self.print("Stopping after this step. Press Ctrl-C again to stop immediately.")
        return is_signalled()

    def stopped_early(self, epoch: int, patience: int) -> None:
        """Print why training ends early."""
        self.print(f"Stopped at epoch {epoch}: no improvement for {patience} epochs.")

    def noted(self, text: str) -> None:
        """Print a note."""
        self.print(text)

    def warned(self, text: str) -> None:
        """Print a warning."""
        self.print(f"Warning: {text}")

    def print(self, text: str) -> None:
        """Print a line on stderr."""
        raise NotImplementedError


class SilentDisplay(StoppableDisplay):
    """Prints nothing, in processes whose run another one displays."""

    def print(self, text: str) -> None:
        """Do nothing."""


class PlainDisplay(StoppableDisplay):
    """Prints one line per epoch, and one per 30 seconds within an epoch."""

    def __init__(self, console: Console, stack: ExitStack | None = None) -> None:
        super().__init__(stack)
        self._console = console
        self._last_line = time.monotonic()

    def checking(self, done: int, total: int) -> None:
        """Print a line once all masks are checked."""
        if done == total:
            self.print(f"Checked {total} image/mask pairs.")

    def step_done(self, step: Step) -> None:
        """Print the progress of the epoch every 30 seconds."""
        if time.monotonic() - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self.print(
                f"epoch {step.epoch}/{self._epochs}  step {step.step}  {describe_step(step)}"
            )

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        """Print the scores of the epoch."""
        self.print(describe_epoch(record, self._epochs, is_best=is_best))

    def print(self, text: str) -> None:
        """Print a line on stderr."""
        self._console.print(escape_message(text), highlight=False, soft_wrap=True, markup=False)
        self._last_line = time.monotonic()


class LiveDisplay(StoppableDisplay):
    """Shows progress bars for epochs and batches, and prints one line per epoch."""

    def __init__(self, progress: Progress, stack: ExitStack | None = None) -> None:
        super().__init__(stack)
        self._progress = progress
        self._check: TaskID | None = None
        self._epochs_task = TaskID(0)
        self._steps_task = TaskID(0)
        self._best: float | None = None

    def checking(self, done: int, total: int) -> None:
        """Advance the bar of the data check."""
        if self._check is None:
            self._check = self._progress.add_task("checking data", total=total, detail="")
        self._progress.update(self._check, completed=done)
        if done == total:
            self._progress.remove_task(self._check)

    def started(self, summary: RunSummary) -> None:
        """Print a summary of the run and show the bars."""
        super().started(summary)
        self._best = summary.best_mean_iou
        self._epochs_task = self._progress.add_task(
            "epochs", total=summary.epochs, completed=summary.first_epoch - 1, detail=""
        )
        self._steps_task = self._progress.add_task(
            "batches", total=summary.steps_per_epoch, detail=""
        )

    def step_done(self, step: Step) -> None:
        """Advance the bar of the batches."""
        self._progress.update(
            self._steps_task,
            completed=step.step,
            description=f"epoch {step.epoch}",
            detail=describe_step(step),
        )

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        """Print the scores of the epoch and advance the bar of the epochs."""
        if is_best:
            self._best = record["mean_iou"]
        best = "" if self._best is None else f"best mIoU {self._best:.3f}"
        self.print(describe_epoch(record, self._epochs, is_best=is_best))
        self._progress.update(self._epochs_task, completed=record["epoch"], detail=best)

    def print(self, text: str) -> None:
        """Print a line on stderr."""
        self._progress.console.print(escape_message(text), highlight=False, markup=False)


def describe_run(summary: RunSummary) -> str:
    """Describe a run in one line."""
    shared = f" in {summary.num_processes} processes" if summary.num_processes > 1 else ""
    batches = f"batches of {summary.batch_size}{shared}, " if summary.batch_size else ""
    images = ", ".join(f"{count} {split}" for split, count in summary.splits.items() if count)
    return (
        f"{images} images, {summary.num_classes} classes; "
        f"{summary.num_parameters / 1e6:.1f} M parameters, "
        f"{len(summary.deformable_layers)} deformable layers; {summary.device} in "
        f"{summary.number_format}; {batches}epochs {summary.first_epoch} to {summary.epochs}"
    )


def describe_step(step: Step) -> str:
    """Format loss, speed and remaining time."""
    return (
        f"loss {step.loss:.3f}  {step.images_per_second:.1f} images/s  "
        f"{describe_seconds(step.seconds_left)} left"
    )


def describe_epoch(record: Mapping[str, Any], epochs: int, *, is_best: bool) -> str:
    """Describe an epoch in one line."""
    loss = "none" if record["loss"] is None else f"{record['loss']:.3f}"
    text = f"epoch {record['epoch']}/{epochs}  loss {loss}"
    if record.get("mean_iou") is not None:
        text += f"  mIoU {record['mean_iou']:.3f}{' (best)' if is_best else ''}"
    if (record.get("regions") or {}).get("ap50") is not None:
        text += f"  region AP50 {record['regions']['ap50']:.3f}"
    offsets = [entry["mean_px"] for entry in record.get("offsets", {}).values()]
    if offsets and None not in offsets:
        text += f"  offsets {sum(offsets) / len(offsets):.2f} px"
    if layers := record.get("runaway_layers"):
        text += f"  (warning: {len(layers)} layers sample mostly outside the feature map)"
    if "skipped_steps" in record:
        text += f"  {record['skipped_steps']} steps skipped (non-finite)"
    return f"{text}  {record['images_per_second']:.1f} images/s  {record['seconds']:.0f} s"


def describe_seconds(seconds: float) -> str:
    """Format a duration as 4:07 or 1:02:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
