"""One update of the weights: forward, backward, and the step where all of it is finite.

The entry point is `Updater`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum, auto

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from dcnseg.engine.losses import Loss
from dcnseg.engine.state import TrainingState


class Outcome(Enum):
    """What became of an update."""

    DONE = auto()
    SKIPPED = auto()  # the loss or the gradient was not finite
    SCALED = auto()  # float16 overflowed; the scale of the loss is lower now


class Updater:
    """Changes the weights by the gradient of one or several batches.

    An update whose loss or gradient is not finite is skipped wholly: weights, averages, schedule
    and the statistics of normalization layers stay as they were before its first batch.
    """

    def __init__(
        self, state: TrainingState, loss: Loss, device: torch.device, amp_dtype: torch.dtype | None
    ) -> None:
        self._state = state
        self._loss = loss
        self._device = device
        self._amp_dtype = amp_dtype
        # By dtype, so that one kernel copies many; the copies are from before the first batch.
        self._buffers = _by_dtype(state.model.buffers())
        self._kept = [[buffer.clone() for buffer in group] for group in self._buffers]
        self._is_first = True  # batch of an update
        self._is_finite = True

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        images = images.to(self._device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self._device, non_blocking=True)
        with torch.autocast(
            self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None
        ):
            logits = self._state.model(images)
        return self._loss(logits, labels)

    def add_batch(self, images: Tensor, labels: Tensor, *, share: float) -> float:
        """Add the gradient of `share` times the batch's loss; returns the loss."""
        if self._is_first:
            _copy(self._buffers, self._kept)
            self._is_first = False
        loss = self.forward(images, labels)
        value = float(loss.detach())
        if math.isfinite(value):
            self._state.scaler.scale(loss * share).backward()
        else:
            self._is_finite = False
        return value

    def update(self) -> Outcome:
        """Step the optimizer and what follows it, if the gradient is finite."""
        outcome = self._step()
        if outcome is not Outcome.DONE:
            _copy(self._kept, self._buffers)
        self._state.optimizer.zero_grad(set_to_none=True)
        self._is_first = self._is_finite = True
        return outcome

    def _step(self) -> Outcome:
        state, scaler = self._state, self._state.scaler
        if not self._is_finite:
            return Outcome.SKIPPED
        scaler.unscale_(state.optimizer)
        groups = state.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not math.isfinite(get_total_norm(gradients)):
            scale = scaler.get_scale()
            scaler.update()
            is_scalers = scale > 1 and scaler.get_scale() < scale
            return Outcome.SCALED if is_scalers else Outcome.SKIPPED
        scaler.step(state.optimizer)
        scaler.update()
        state.schedule.step()
        if state.average is not None:
            state.average.update_parameters(state.model)
        return Outcome.DONE


def _by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _copy(sources: list[list[Tensor]], targets: list[list[Tensor]]) -> None:
    for source, target in zip(sources, targets, strict=True):
        torch._foreach_copy_(target, source)
