"""Memory that is not enough, in words; the entry point is `explain_out_of_memory`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dcnseg.config import PredictConfig
from dcnseg.device import is_out_of_memory
from dcnseg.errors import TrainingError


@contextmanager
def explain_out_of_memory(
    crop_size: Sequence[int], batch_size: int, device: torch.device
) -> Iterator[None]:
    """Within it, a lack of memory is an error that says at which size and what may help.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        height, width = crop_size
        smaller = ", ".join(
            option
            for option, is_possible in (
                (f"--batch-size {max(2, batch_size // 2)} --accumulate 2", batch_size > 2),
                (f"--crop-size {max(32, height // 2)},{max(32, width // 2)}", True),
                ("--amp bf16", True),
            )
            if is_possible
        )
        raise TrainingError(
            f"The memory of {device} is not enough for a batch of {batch_size} crops of "
            f"{height}x{width}. Start a new run with one of: {smaller}, or --batch-size auto."
        ) from error


@contextmanager
def explain_out_of_memory_in_evaluation(device: torch.device, checkpoint: Path) -> Iterator[None]:
    """Within it, a lack of memory while validation images are predicted is an error.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"The memory of {device} is not enough to predict a validation image in windows of "
            f"{PredictConfig.window} pixels. Make the images smaller, or start a new run with a "
            f"lower --input-scale. The last saved state is {checkpoint}."
        ) from error
