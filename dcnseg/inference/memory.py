"""Memory that does not suffice for an image, in words.

Entry points: `explain_out_of_memory` and `check_probabilities_fit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dcnseg.device import free_memory, is_out_of_memory
from dcnseg.errors import DataError
from dcnseg.inference.predictor import Predictor

LEAST_WINDOW = 64


@contextmanager
def explain_out_of_memory(
    path: Path, size_hw: Sequence[int], predictor: Predictor
) -> Iterator[None]:
    """Within it, a lack of memory is an error that names the image and a smaller window.

    Raises:
        DataError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if predictor.device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(size_hw) * predictor.preprocessing.input_scale
        used = int(min(predictor.config.window, longest))
        smaller = max(LEAST_WINDOW, used // 2)
        advice = f"Try --window {smaller}" if smaller < used else "Resize the image"
        raise DataError(
            f"{path}: the memory of {predictor.device} is not enough for this image of "
            f"{size_hw[1]}x{size_hw[0]} with --window {predictor.config.window}. {advice}."
        ) from error


def check_probabilities_fit(path: Path, size_hw: Sequence[int], num_classes: int) -> None:
    """Refuse to keep probabilities that would not fit into memory.

    Raises:
        DataError: they take more than is free.
    """
    needed, free = 2 * num_classes * size_hw[0] * size_hw[1], free_memory()
    if needed > free:
        raise DataError(
            f"{path}: the probabilities of {num_classes} classes for {size_hw[1]}x{size_hw[0]} "
            f"pixels take {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB of memory are free. Cut the "
            "image into parts, or use --save confidence instead of probabilities."
        )
