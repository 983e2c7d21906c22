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
from dcnseg_cli.console import open_console
from dcnseg_cli.reporting import is_signalled, postponed_signals, raise_if_signalled
from dcnseg_cli.terminal_text import escape_message

PLAIN_INTERVAL_SECONDS = 30.0


@contextmanager
def training_display() -> Iterator[TrainingListener]:
    """Yield a listener that fits stderr; the terminal is restored at the end.

    From the moment that training has started, a first signal lets it finish its step and save.
    """
    console = open_console(stderr=True)
    with ExitStack() as stack:
        if console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            progress = Progress(*columns, console=console, expand=True)
            listener: TrainingListener = LiveDisplay(stack.enter_context(progress), stack)
        else:
            listener = PlainDisplay(console, stack)
        try:
            yield listener
        except TrainingStoppedError:
            raise_if_signalled()
            raise


class StoppableDisplay(TrainingListener):
    """What both displays share: stopping after a step, and lines of text.

    Args:
        stack: Closed when the display ends; from the start of training until then a first signal
            only asks to stop. Without it signals are left alone.
    """

    def __init__(self, stack: ExitStack | None) -> None:
        self._stack = stack
        self._epochs = 0
        self._has_said_so = False

    def started(self, summary: RunSummary) -> None:
        """Say what will be done."""
        self._epochs = summary.epochs
        if self._stack is not None:
            self._stack.enter_context(postponed_signals())
        self.print(describe_run(summary))

    def stop_requested(self) -> bool:
        """Whether a signal has come; says so once."""
        if is_signalled() and not self._has_said_so:
            self._has_said_so = True
            self.print("Stopping after this step; once more stops at once.")
        return is_signalled()

    def stopped_early(self, epoch: int, patience: int) -> None:
        """Say why training ends."""
        self.print(f"Stopped at epoch {epoch}: no better score for {patience} epochs.")

    def noted(self, text: str) -> None:
        """Leave it as a line."""
        self.print(text)

    def warned(self, text: str) -> None:
        """Say what looks wrong."""
        self.print(f"Warning: {text}")

    def print(self, text: str) -> None:
        """Leave a line on stderr."""
        raise NotImplementedError


class PlainDisplay(StoppableDisplay):
    """One line per epoch, and one per half minute within an epoch."""

    def __init__(self, console: Console, stack: ExitStack | None = None) -> None:
        super().__init__(stack)
        self._console = console
        self._last_line = time.monotonic()

    def checking(self, done: int, total: int) -> None:
        """Say when all masks have been looked at."""
        if done == total:
            self.print(f"Looked at {total} images and masks.")

    def step_done(self, step: Step) -> None:
        """Say how far the epoch is, from time to time."""
        if time.monotonic() - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self.print(
                f"epoch {step.epoch}/{self._epochs}  step {step.step}  {describe_step(step)}"
            )

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        """Say what the epoch brought."""
        self.print(describe_epoch(record, self._epochs, is_best=is_best))

    def print(self, text: str) -> None:
        """Leave a line on stderr."""
        self._console.print(escape_message(text), highlight=False, soft_wrap=True, markup=False)
        self._last_line = time.monotonic()


class LiveDisplay(StoppableDisplay):
    """A bar for the epochs and one for the batches; each epoch leaves a line."""

    def __init__(self, progress: Progress, stack: ExitStack | None = None) -> None:
        super().__init__(stack)
        self._progress = progress
        self._check: TaskID | None = None
        self._epochs_task = TaskID(0)
        self._steps_task = TaskID(0)
        self._best: float | None = None

    def checking(self, done: int, total: int) -> None:
        """Move the bar of the masks looked at."""
        if self._check is None:
            self._check = self._progress.add_task("looking at masks", total=total, detail="")
        self._progress.update(self._check, completed=done)
        if done == total:
            self._progress.remove_task(self._check)

    def started(self, summary: RunSummary) -> None:
        """Say what will be done and put up the bars."""
        super().started(summary)
        self._best = summary.best_mean_iou
        self._epochs_task = self._progress.add_task(
            "epochs", total=summary.epochs, completed=summary.first_epoch - 1, detail=""
        )
        self._steps_task = self._progress.add_task(
            "batches", total=summary.steps_per_epoch, detail=""
        )

    def step_done(self, step: Step) -> None:
        """Move the bar of the batches."""
        self._progress.update(
            self._steps_task,
            completed=step.step,
            description=f"epoch {step.epoch}",
            detail=describe_step(step),
        )

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        """Leave the epoch's line and move the bar of the epochs."""
        if is_best:
            self._best = record["mean_iou"]
        best = "" if self._best is None else f"best mIoU {self._best:.3f}"
        self.print(describe_epoch(record, self._epochs, is_best=is_best))
        self._progress.update(self._epochs_task, completed=record["epoch"], detail=best)

    def print(self, text: str) -> None:
        """Leave a line on stderr."""
        self._progress.console.print(escape_message(text), highlight=False, markup=False)


def describe_run(summary: RunSummary) -> str:
    """One line about what a run is about to do."""
    batches = f"batches of {summary.batch_size}, " if summary.batch_size else ""
    images = ", ".join(f"{count} {split}" for split, count in summary.splits.items() if count)
    return (
        f"{images} images, {summary.num_classes} classes; "
        f"{summary.num_parameters / 1e6:.1f} M parameters, "
        f"{len(summary.deformable_layers)} deformable layers; {summary.device} in "
        f"{summary.number_format}; {batches}epochs {summary.first_epoch} to {summary.epochs}"
    )


def describe_step(step: Step) -> str:
    """Loss, speed and time left."""
    return (
        f"loss {step.loss:.3f}  {step.images_per_second:.1f} images/s  "
        f"{describe_seconds(step.seconds_left)} left"
    )


def describe_epoch(record: Mapping[str, Any], epochs: int, *, is_best: bool) -> str:
    """One line about an epoch's scores."""
    loss = "none" if record["loss"] is None else f"{record['loss']:.3f}"
    text = f"epoch {record['epoch']}/{epochs}  loss {loss}"
    if record.get("mean_iou") is not None:
        text += f"  mIoU {record['mean_iou']:.3f}{' (best)' if is_best else ''}"
    offsets = [entry["mean_px"] for entry in record.get("offsets", {}).values()]
    if offsets and None not in offsets:
        text += f"  offsets {sum(offsets) / len(offsets):.2f} px"
    if layers := record.get("runaway_layers"):
        text += f"  (Warning: the offsets of {len(layers)} layers lead off the map)"
    if "skipped_steps" in record:
        text += f"  {record['skipped_steps']} steps skipped (not finite)"
    return f"{text}  {record['images_per_second']:.1f} images/s  {record['seconds']:.0f} s"


def describe_seconds(seconds: float) -> str:
    """A duration such as 4:07 or 1:02:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
