"""The largest batch that fits into memory, found by trying; the entry point is `fitting_batch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcnseg.config import TrainConfig
from dcnseg.device import free_memory, is_out_of_memory, select_amp_dtype, select_device
from dcnseg.engine.losses import build_loss
from dcnseg.engine.out_of_memory import explain_out_of_memory
from dcnseg.engine.state import build_state
from dcnseg.engine.updates import Updater
from dcnseg.models.pretrained import NO_WEIGHTS

GPU_SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CPU_MOST = 16  # more is no faster on a CPU
USED_SHARE = 0.7  # of the free memory; the rest is for the loading processes
WORKING_FACTOR = 2.0  # gradients and columns beside what is kept for the backward


def fitting_batch(config: TrainConfig, *, num_classes: int, num_images: int) -> int:
    """The number of images per batch that `--batch-size auto` means.

    A GPU is given larger and larger batches until one does not fit. On a CPU, where running out of
    memory ends the process, the need is estimated from one batch of two.

    Args:
        config: All settings; the batch size is passed over.
        num_classes: K.
        num_images: Training images; a batch has at most as many.

    Raises:
        TrainingError: not even two images fit.
    """
    device = select_device(config.device)
    state = build_state(
        config,
        num_classes=num_classes,
        updates_per_epoch=2,
        device=device,
        encoder_weights=NO_WEIGHTS,
    )
    updater = Updater(
        state, build_loss(config.loss, None), device, select_amp_dtype(config.amp, device)
    )
    state.model.train()

    def try_batch(size: int) -> None:
        height, width = config.data.crop_size
        images = torch.rand(size, 3, height, width)
        labels = torch.randint(num_classes, (size, height, width))
        updater.add_batch(images, labels, share=1.0)
        updater.update()

    with explain_out_of_memory(config.data.crop_size, 2, device):
        if device.type == "cuda":
            size = _largest_that_fits(try_batch)
            torch.cuda.empty_cache()
        else:
            size = _largest_by_estimate(try_batch, list(state.model.parameters()), free_memory())
    return max(2, min(size, num_images))


def _largest_that_fits(try_batch: Callable[[int], None]) -> int:
    """The last of the sizes that fits, one below the largest possible: images need room too."""
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


def _largest_by_estimate(
    try_batch: Callable[[int], None], weights: Sequence[Tensor], free_bytes: float
) -> int:
    """How many images fit, by what the backward of a batch of two keeps beside the weights."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        try_batch(2)
    for weight in weights:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    per_image = WORKING_FACTOR * sum(kept.values()) / 2
    return max(2, min(CPU_MOST, int(USED_SHARE * free_bytes / per_image)))
