"""Counts the batches of an epoch: mean loss, speed, time left."""

from __future__ import annotations

import time

from dcnseg.engine.listener import Step, TrainingListener


class EpochProgress:
    """Turns the batches of one epoch into what the listener is told."""

    def __init__(
        self, epoch: int, epochs: int, num_images: int, listener: TrainingListener
    ) -> None:
        self._epoch = epoch
        self._images_after = (epochs - epoch) * num_images
        self._num_images = num_images
        self._listener = listener
        self._started = time.perf_counter()
        self._images = 0
        self._loss_sum = 0.0

    @property
    def images_per_second(self) -> float:
        """Training pictures per second since the epoch began."""
        return round(self._images / max(1e-9, time.perf_counter() - self._started), 2)

    @property
    def mean_loss(self) -> float:
        """Mean loss of the pictures so far."""
        return round(self._loss_sum / max(1, self._images), 6)

    def step_done(self, step: int, num_images: int, loss: float) -> None:
        """Count a batch of `num_images` whose mean loss is `loss`, and tell the listener."""
        self._images += num_images
        self._loss_sum += loss * num_images
        rate = self.images_per_second
        remaining = self._images_after + self._num_images - self._images
        self._listener.step_done(
            Step(self._epoch, step, self.mean_loss, rate, remaining / max(rate, 1e-9))
        )
