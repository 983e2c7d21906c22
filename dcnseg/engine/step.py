"""One optimizer step over a group of batches; the entry point is `TrainingStep`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from dcnseg.engine.loading import Batch, BatchGroup
from dcnseg.engine.optim import Loss
from dcnseg.engine.region_objective import RegionObjective
from dcnseg.engine.state import TrainingState


class StepOutcome(Enum):
    """The result of an optimizer step."""

    UPDATED = auto()
    SKIPPED = auto()  # the loss or the gradient was not finite
    OVERFLOWED = auto()  # float16 overflowed, and the loss scale was reduced


class TrainingStep:
    """Updates the weights with the mean gradient of a group of batches.

    If a loss or the gradient is not finite, the step is skipped: weights, average, schedule and
    batch-norm statistics keep the values they had before the group.
    """

    def __init__(
        self,
        state: TrainingState,
        loss: Loss,
        device: torch.device,
        amp_dtype: torch.dtype | None,
        regions: RegionObjective | None = None,
    ) -> None:
        self._state = state
        self._loss = loss
        self._device = device
        self._amp_dtype = amp_dtype
        self._regions = regions
        # Grouped by dtype, so that one kernel copies many buffers.
        self._buffers = _group_by_dtype(state.model.buffers())
        self._saved_buffers = [[buffer.clone() for buffer in group] for group in self._buffers]
        self._last_batch: Batch | None = None

    def __call__(
        self, group: BatchGroup, on_batch: Callable[[int, float], None] = lambda _size, _loss: None
    ) -> StepOutcome:
        """Accumulate the gradients of a group and step the optimizer if they are finite.

        `on_batch` is called after each batch with its number of images and its loss.
        """
        _copy(self._buffers, self._saved_buffers)
        is_finite = True
        for images, labels in group.batches:
            self._last_batch = images, labels
            loss = self._forward(images, labels)
            value = float(loss.detach())
            if math.isfinite(value):
                self._state.scaler.scale(loss * (1 / group.size)).backward()
            else:
                is_finite = False
            on_batch(len(images), value)
        outcome = self._update() if is_finite else StepOutcome.SKIPPED
        if outcome is not StepOutcome.UPDATED:
            _copy(self._saved_buffers, self._buffers)
        self._state.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images = images.to(self._device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self._device, non_blocking=True)
        with torch.autocast(
            self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None
        ):
            if self._regions is None:
                logits, region_loss = self._state.model(images), None
            else:
                logits, region_loss = self._regions.forward(self._state.model, images, labels)
        loss = self._loss(logits, labels)
        return loss if region_loss is None else loss + region_loss

    def _update(self) -> StepOutcome:
        state, scaler = self._state, self._state.scaler
        scaler.unscale_(state.optimizer)
        groups = state.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not math.isfinite(get_total_norm(gradients)):
            scale = scaler.get_scale()
            scaler.update()
            is_overflow = scale > 1 and scaler.get_scale() < scale
            return StepOutcome.OVERFLOWED if is_overflow else StepOutcome.SKIPPED
        scaler.step(state.optimizer)
        scaler.update()
        state.schedule.step()
        if state.average is not None:
            state.average.update_parameters(state.model)
        return StepOutcome.UPDATED

    def find_non_finite(self) -> str:
        """Describe the first tensor with NaN or infinity in a repetition of the last batch.

        The order is: weights, images, outputs of the layers, loss, gradients from the last layer to
        the first. Gradients are overwritten.
        """
        assert self._last_batch is not None, "no batch has been processed"
        images, labels = self._last_batch
        model = self._state.model
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not _is_finite(tensor):
                return f"the weight {name}"
        if not _is_finite(images):
            return "a pixel of the images"
        loss, layer = self._forward_and_find_layer(images, labels)
        if layer is not None:
            return f"the output of the layer {layer}"
        if not _is_finite(loss):
            return "the loss; all layer outputs are finite"
        model.zero_grad(set_to_none=True)
        loss.backward()
        for name, parameter in reversed(list(model.named_parameters())):
            if parameter.grad is not None and not _is_finite(parameter.grad):
                return f"the gradient of {name}"
        return "the norm of the gradient; all its elements are finite"

    def _forward_and_find_layer(self, images: Tensor, labels: Tensor) -> tuple[Tensor, str | None]:
        """Compute the loss and the name of the first layer whose output is not finite."""
        found: list[str] = []

        def check(name: str, output: Any) -> None:
            if not _is_finite(output):
                found.append(name)

        handles = [
            layer.register_forward_hook(lambda _layer, _inputs, out, name=name: check(name, out))
            for name, layer in self._state.model.named_modules()
            if name and not any(layer.children())
        ]
        try:
            return self._forward(images, labels), next(iter(found), None)
        finally:
            for handle in handles:
                handle.remove()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def _group_by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _copy(sources: list[list[Tensor]], targets: list[list[Tensor]]) -> None:
    for source, target in zip(sources, targets, strict=True):
        torch._foreach_copy_(target, source)
