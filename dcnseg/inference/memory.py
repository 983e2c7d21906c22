"""Messages for images that do not fit into memory.

Entry points: `out_of_memory_error` and `check_probabilities_fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dcnseg.device import free_memory
from dcnseg.errors import DataError
from dcnseg.inference.predictor import Predictor

MIN_WINDOW = 64


def out_of_memory_error(path: Path, size_hw: Sequence[int], predictor: Predictor) -> DataError:
    """Build an error that names the image and suggests a smaller window."""
    longest = max(size_hw) * predictor.preprocessing.input_scale
    used = int(min(predictor.config.window, longest))
    smaller = max(MIN_WINDOW, used // 2)
    advice = f"Use --window {smaller}" if smaller < used else "Resize the image"
    return DataError(
        f"{path}: out of memory on {predictor.device} for an image of "
        f"{size_hw[1]}x{size_hw[0]} pixels with --window {predictor.config.window}. {advice}."
    )


def check_probabilities_fit(path: Path, size_hw: Sequence[int], num_classes: int) -> None:
    """Check that the probabilities of an image fit into memory.

    Raises:
        DataError: They need more memory than is free.
    """
    needed, free = 2 * num_classes * size_hw[0] * size_hw[1], free_memory()
    if needed > free:
        raise DataError(
            f"{path}: the probabilities of {num_classes} classes for {size_hw[1]}x{size_hw[0]} "
            f"pixels need {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free. Split the "
            "image, or use --save confidence instead of probabilities."
        )
