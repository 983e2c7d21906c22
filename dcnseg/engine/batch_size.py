"""The largest batch that fits into memory, and what to do if none does.

Entry points: `find_batch_size`, `explain_training_out_of_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from dcnseg.config import TrainConfig
from dcnseg.device import (
    explain_out_of_memory,
    free_memory,
    is_out_of_memory,
    select_amp_dtype,
    select_device,
)
from dcnseg.engine.loading import BatchGroup
from dcnseg.engine.optim import build_loss
from dcnseg.engine.region_objective import build_region_objective
from dcnseg.engine.state import build_state
from dcnseg.engine.step import TrainingStep
from dcnseg.errors import TrainingError
from dcnseg.models.pretrained import NO_WEIGHTS

GPU_SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CPU_MAX = 16  # larger batches are no faster on a CPU
USED_SHARE = 0.7  # of the free memory; the rest is for the data loading workers
WORKING_FACTOR = 2.0  # gradients and columns, relative to the tensors saved for the backward pass


def explain_training_out_of_memory(
    config: TrainConfig, device: torch.device
) -> AbstractContextManager[None]:
    """Replace an out-of-memory error by a TrainingError that suggests smaller settings."""

    def make_error() -> TrainingError:
        (height, width), size = config.data.crop_size, config.batch_size
        options = [f"--crop-size {max(32, height // 2)},{max(32, width // 2)}", "--amp bf16"]
        if size > 2:
            options.insert(0, f"--batch-size {max(2, size // 2)} --accumulate 2")
        return TrainingError(
            f"Out of memory on {device} for a batch of {size} crops of {height}x{width}. Start a "
            f"new run with one of: {', '.join(options)}, or --batch-size auto."
        )

    return explain_out_of_memory(make_error)


def find_batch_size(config: TrainConfig, *, num_classes: int, num_images: int) -> int:
    """Find the batch size for `--batch-size auto`.

    The batch size of `config` is ignored. On a GPU, batches are enlarged until one does not fit. On
    a CPU, where running out of memory would end the process, the size is estimated from the memory
    use of a batch of two.

    Raises:
        TrainingError: a batch of two images does not fit.
    """
    device = select_device(config.device)
    state = build_state(
        config,
        num_classes=num_classes,
        updates_per_epoch=2,
        device=device,
        encoder_weights=NO_WEIGHTS,
    )
    loss = build_loss(config.loss, None)
    regions = build_region_objective(config, range(num_classes), num_classes)
    step = TrainingStep(state, loss, device, select_amp_dtype(config.amp, device), regions)
    state.model.train()

    def try_batch(size: int) -> None:
        height, width = config.data.crop_size
        images = torch.rand(size, 3, height, width)
        labels = torch.randint(num_classes, (size, height, width))
        step(BatchGroup(1, [(images, labels)]))

    with explain_training_out_of_memory(replace(config, batch_size=2), device):
        if device.type == "cuda":
            size = _find_largest(try_batch)
            torch.cuda.empty_cache()
        else:
            size = _estimate_largest(try_batch, list(state.model.parameters()), free_memory())
    return max(2, min(size, num_images))


def _find_largest(try_batch: Callable[[int], None]) -> int:
    """Return the second largest size that fits, which leaves some memory free."""
    fitting: list[int] = []
    for size in GPU_SIZES:
        try:
            try_batch(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not fitting:
                raise
            return fitting[max(0, len(fitting) - 2)]
        fitting.append(size)
    return fitting[-1]


def _estimate_largest(
    try_batch: Callable[[int], None], weights: Sequence[Tensor], free_bytes: float
) -> int:
    """Estimate the size from the tensors, other than weights, saved for a backward pass."""
    saved_bytes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        try_batch(2)
    for weight in weights:
        saved_bytes.pop(weight.untyped_storage().data_ptr(), None)
    per_image = WORKING_FACTOR * sum(saved_bytes.values()) / 2
    return max(2, min(CPU_MAX, int(USED_SHARE * free_bytes / per_image)))
