"""How a running training tells what it does; the command line draws it, programs may ignore it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunSummary:
    """What a run is about to do.

    Attributes:
        run: The run folder.
        splits: Images per split.
        num_classes: K.
        num_parameters: Parameters of the network.
        deformable_layers: Names of the deformable layers.
        device: Where it computes.
        number_format: "float32", "bfloat16" or "float16".
        first_epoch: The epoch that comes next, counted from 1; more than 1 after a resume.
        epochs: Epochs in all.
        steps_per_epoch: Batches of an epoch.
        best_mean_iou: Best validation score of the epochs before a resume; None without one.
        batch_size: Images per batch; 0 where it is not told.
    """

    run: Path
    splits: Mapping[str, int]
    num_classes: int
    num_parameters: int
    deformable_layers: tuple[str, ...]
    device: str
    number_format: str
    first_epoch: int
    epochs: int
    steps_per_epoch: int
    best_mean_iou: float | None = None
    batch_size: int = 0


@dataclass(frozen=True)
class Step:
    """One batch of an epoch is done; both count from 1. `loss` is the mean of the epoch so far."""

    epoch: int
    step: int
    loss: float
    images_per_second: float
    seconds_left: float


class TrainingListener:
    """Receives what happens; every method does nothing unless it is overridden."""

    def checking(self, done: int, total: int) -> None:
        """A mask has been looked at before training begins."""

    def started(self, summary: RunSummary) -> None:
        """Training begins, or goes on."""

    def step_done(self, step: Step) -> None:
        """A batch is done."""

    def epoch_done(self, record: Mapping[str, Any], *, is_best: bool) -> None:
        """An epoch is done; `record` is its line of metrics.jsonl."""

    def stopped_early(self, epoch: int, patience: int) -> None:
        """The score has not improved for `patience` epochs."""

    def stop_requested(self) -> bool:
        """Whether to save the state after this step and raise a TrainingStoppedError."""
        return False

    def noted(self, text: str) -> None:
        """Something is worth knowing, such as which weights training starts from."""

    def warned(self, text: str) -> None:
        """Something looks wrong, but training goes on."""
