"""Progress of a training run, reported to a `TrainingListener`.

The command line overrides the listener's methods to draw a display.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunSummary:
    """A run that is about to start or resume."""

    run: Path
    splits: Mapping[str, int]  # number of images
    num_classes: int
    num_parameters: int
    deformable_layers: tuple[str, ...]
    device: str
    number_format: str  # "float32", "bfloat16" or "float16"
    first_epoch: int  # from 1; greater than 1 after a resume
    epochs: int
    steps_per_epoch: int  # batches
    best_mean_iou: float | None = None  # before a resume
    batch_size: int = 0  # of all processes; 0 if unknown
    num_processes: int = 1


@dataclass(frozen=True)
class Step:
    """Progress after a batch. Epoch and step count from 1; `loss` is the epoch's mean so far."""

    epoch: int
    step: int
    loss: float
    images_per_second: float
    seconds_left: float


class TrainingListener:
    """Callbacks of a training run; override the ones you need."""

    def checking(self, done: int, total: int) -> None:
        """Called after each mask that is checked before training."""

    def started(self, summary: RunSummary) -> None:
        """Called when training starts or resumes."""

    def step_done(self, step: Step) -> None:
        """Called after each batch."""

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        """Called after each epoch with its record in metrics.jsonl."""

    def stopped_early(self, epoch: int, patience: int) -> None:
        """Called when training stops after `patience` epochs without improvement."""

    def stop_requested(self) -> bool:
        """Return True to save a checkpoint and stop with a TrainingStoppedError."""
        return False

    def noted(self, text: str) -> None:
        """Called with information, such as which initial weights were loaded."""

    def warned(self, text: str) -> None:
        """Called with a warning; training continues."""


@dataclass
class PartialEpoch:
    """Progress of an unfinished epoch, saved in checkpoints."""

    lr: float  # at the start of the epoch
    step: int = 0  # finished batches
    images: int = 0  # with a finite loss
    loss_sum: float = 0.0  # of these images
    skipped: int = 0  # steps whose loss or gradient was not finite
    amp_skipped: int = 0  # steps that overflowed in float16

    @property
    def mean_loss(self) -> float:
        """Mean loss of the images so far; NaN if there are none."""
        return round(self.loss_sum / self.images, 6) if self.images else math.nan


class EpochProgress:
    """Accumulates the loss of an epoch's batches and reports each batch to the listener."""

    def __init__(
        self,
        partial: PartialEpoch,
        *,
        epoch: int,
        epochs: int,
        num_images: int,
        listener: TrainingListener,
    ) -> None:
        self._partial = partial
        self._epoch = epoch
        self._images_left = (epochs - epoch + 1) * num_images - partial.images
        self._listener = listener
        self._started = time.perf_counter()
        self._images = 0

    @property
    def images_per_second(self) -> float:
        """Training images per second since the start or resume of the epoch."""
        return round(self._images / max(1e-9, time.perf_counter() - self._started), 2)

    def batch_done(self, num_images: int, loss: float) -> None:
        """Count a batch of `num_images` images with mean loss `loss`."""
        partial = self._partial
        self._images += num_images
        partial.step += 1
        if math.isfinite(loss):
            partial.images += num_images
            partial.loss_sum += loss * num_images
        rate = self.images_per_second
        seconds_left = max(0, self._images_left - self._images) / max(rate, 1e-9)
        self._listener.step_done(
            Step(self._epoch, partial.step, partial.mean_loss, rate, seconds_left)
        )
