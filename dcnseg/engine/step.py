"""One optimizer step over a group of batches; the entry point is `TrainingStep`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from dcnseg.engine.distributed import SINGLE, World
from dcnseg.engine.loading import Batch, BatchGroup
from dcnseg.engine.optim import Loss, LossWeight
from dcnseg.engine.region_objective import RegionObjective
from dcnseg.engine.state import TrainingState

MIN_WEIGHT: Final = 1e-30  # of a batch in which all pixels are ignored


class StepOutcome(Enum):
    """The result of an optimizer step."""

    UPDATED = auto()
    SKIPPED = auto()  # the loss or the gradient was not finite
    OVERFLOWED = auto()  # float16 overflowed, and the loss scale was reduced


class TrainingStep:
    """Updates the weights with the mean gradient of a group of batches.

    If a loss or the gradient is not finite, the step is skipped: weights, average, schedule and
    batch-norm statistics keep the values they had before the group.

    Each of several processes has a part of every batch. The result is that of one process with the
    whole batch, apart from batch-norm statistics on the CPU, dropout, and the random regions.

    Args:
        state: The network, its optimizer and what else changes.
        loss: See `build_loss`.
        device: Where the network is.
        amp_dtype: Dtype of mixed precision; None: float32.
        regions: Loss of the region head, if there is one.
        weigh: See `build_loss_weight`; needed for several processes.
        world: The processes.
    """

    def __init__(
        self,
        state: TrainingState,
        loss: Loss,
        device: torch.device,
        amp_dtype: torch.dtype | None,
        regions: RegionObjective | None = None,
        *,
        weigh: LossWeight | None = None,
        world: World = SINGLE,
    ) -> None:
        self._state = state
        self._loss = loss
        self._device = device
        self._amp_dtype = amp_dtype
        self._regions = regions
        self._weigh = weigh
        self._world = world
        self._network = world.parallelize(state.model)
        # Grouped by dtype, so that one kernel copies many buffers.
        self._buffers = _group_by_dtype(state.model.buffers())
        self._saved_buffers = [[buffer.clone() for buffer in group] for group in self._buffers]
        self._last_batch: Batch | None = None

    def __call__(
        self, group: BatchGroup, on_batch: Callable[[int, float], None] = lambda _size, _loss: None
    ) -> StepOutcome:
        """Accumulate the gradients of a group and step the optimizer if they are finite.

        `on_batch` is called after each batch with its number of images in this process, and its
        loss over the images of all processes.
        """
        _copy(self._buffers, self._saved_buffers)
        is_finite = True
        for number, (images, labels) in enumerate(group.batches, 1):
            self._last_batch = images, labels
            with self._accumulating(is_last=number == group.size):
                loss = self._forward(images, labels)
                value = float(self._world.mean(loss.detach()))  # not finite in all or in none
                if math.isfinite(value):
                    self._state.scaler.scale(loss * (1 / group.size)).backward()
                else:
                    is_finite = False
            on_batch(len(images), value)
        self._world.average_buffers(self._state.model)
        outcome = self._update() if is_finite else StepOutcome.SKIPPED
        if outcome is not StepOutcome.UPDATED:
            _copy(self._saved_buffers, self._buffers)
        self._state.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _accumulating(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Exchange gradients with the other processes only in the last batch of a group."""
        if is_last or not isinstance(self._network, DistributedDataParallel):
            return nullcontext()
        return self._network.no_sync()

    def _forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch; the mean over the processes is that of the whole batch."""
        images = images.to(self._device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self._device, non_blocking=True)
        with torch.autocast(
            self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None
        ):
            if self._regions is None:
                logits, region_loss = self._network(images), None
            else:
                logits, region_loss = self._regions.forward(
                    self._network, images, labels, self._world.mean
                )
        loss = self._loss(logits, labels)
        if self._world.size > 1:
            assert self._weigh is not None, "several processes need the weights of their losses"
            weight = self._weigh(labels)
            mean = self._world.mean(weight)
            loss = loss * (weight / mean.clamp(min=MIN_WEIGHT)).to(loss.dtype)
        return loss if region_loss is None else loss + region_loss

    def _update(self) -> StepOutcome:
        state, scaler = self._state, self._state.scaler
        scaler.unscale_(state.optimizer)
        groups = state.optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not math.isfinite(self._world.mean(get_total_norm(gradients))):
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
        the first.
        """
        if self._world.size == 1:
            return next(self._find_all_non_finite())
        # All processes compute everything, because synchronized batch normalization waits for all.
        found = self._world.gather(list(self._find_all_non_finite()))
        rank = max(
            range(len(found)), key=lambda rank: len(found[rank])
        )  # what follows is wrong too
        return f"{found[rank][0]} (rank {rank})"

    def _find_all_non_finite(self) -> Iterator[str]:
        assert self._last_batch is not None, "no batch has been processed"
        images, labels = self._last_batch
        model = self._state.model
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not _is_finite(tensor):
                yield f"the weight {name}"
        if not _is_finite(images):
            yield "a pixel of the images"
        loss, layer = self._forward_and_find_layer(images, labels)
        if layer is not None:
            yield f"the output of the layer {layer}"
        if not _is_finite(loss):
            yield "the loss; all layer outputs are finite"
        names, parameters = zip(*reversed(list(model.named_parameters())), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None and not _is_finite(gradient):
                yield f"the gradient of {name}"
        yield "the norm of the gradient; all its elements are finite"

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
