"""Memory that does not suffice for an image, in words.

Entry points: `out_of_memory_error` and `check_probabilities_fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dcnseg.device import free_memory
from dcnseg.errors import DataError
from dcnseg.inference.predictor import Predictor

LEAST_WINDOW = 64


def out_of_memory_error(path: Path, size_hw: Sequence[int], predictor: Predictor) -> DataError:
    """Build an error that names the image and suggests a smaller window."""
    longest = max(size_hw) * predictor.preprocessing.input_scale
    used = int(min(predictor.config.window, longest))
    smaller = max(LEAST_WINDOW, used // 2)
    advice = f"Try --window {smaller}" if smaller < used else "Resize the image"
    return DataError(
        f"{path}: the memory of {predictor.device} is not enough for this image of "
        f"{size_hw[1]}x{size_hw[0]} with --window {predictor.config.window}. {advice}."
    )


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
