"""Counts the batches of an epoch: mean loss, speed, time left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from dcnseg.engine.listener import Step, TrainingListener


@dataclass
class PartialEpoch:
    """What has happened in an epoch that is not complete; saved with the state of the run.

    Attributes:
        lr: Learning rate at its beginning.
        step: Batches that are done.
        images: Images whose loss was finite.
        loss_sum: Sum of their losses.
        skipped: Updates skipped since a loss or gradient was not finite.
        amp_skipped: Updates skipped since float16 overflowed and its scale was too high.
    """

    lr: float
    step: int = 0
    images: int = 0
    loss_sum: float = 0.0
    skipped: int = 0
    amp_skipped: int = 0

    @property
    def mean_loss(self) -> float:
        """Mean loss of the images so far; NaN where none was finite."""
        return round(self.loss_sum / self.images, 6) if self.images else math.nan


class EpochReporter:
    """Turns the batches of one epoch into what the listener is told."""

    def __init__(
        self,
        so_far: PartialEpoch,
        *,
        epoch: int,
        epochs: int,
        num_images: int,
        listener: TrainingListener,
    ) -> None:
        self._so_far = so_far
        self._epoch = epoch
        self._images_left = (epochs - epoch + 1) * num_images - so_far.images
        self._listener = listener
        self._started = time.perf_counter()
        self._images = 0

    @property
    def images_per_second(self) -> float:
        """Training images per second since the epoch began, or was gone on with."""
        return round(self._images / max(1e-9, time.perf_counter() - self._started), 2)

    def step_done(self, step: int, num_images: int, loss: float) -> None:
        """Count a batch of `num_images` whose mean loss is `loss`, and tell the listener."""
        self._images += num_images
        self._so_far.step = step
        if math.isfinite(loss):
            self._so_far.images += num_images
            self._so_far.loss_sum += loss * num_images
        rate = self.images_per_second
        seconds_left = max(0, self._images_left - self._images) / max(rate, 1e-9)
        self._listener.step_done(
            Step(self._epoch, step, self._so_far.mean_loss, rate, seconds_left)
        )
