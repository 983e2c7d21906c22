"""Comparison of images with the training images.

Entry points: `summarize_training_images` in training, `compare_with_training` in prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dcnseg.checkpoint import TrainingDataStats
from dcnseg.data.image_io import is_gray, read_image

MAX_SAMPLES: Final = 16
# Training scales images by 0.5 to 2 by default.
SIZE_TOLERANCE: Final = 2.0
LARGER, SMALLER, GRAY, COLORED = "larger", "smaller", "gray", "colored"


def summarize_training_images(paths: Sequence[Path]) -> TrainingDataStats:
    """Compute the statistics of up to 16 images, evenly sampled from `paths`.

    Raises:
        DataError: An image cannot be read; the message names it.
    """
    count = min(len(paths), MAX_SAMPLES)
    images = (read_image(paths[i * len(paths) // count]) for i in range(count))
    inspected = [(image.shape[0], image.shape[1], is_gray(image)) for image in images]
    heights, widths, are_gray = zip(*inspected, strict=True)
    return TrainingDataStats(
        num_images=len(paths),
        min_size_hw=(min(heights), min(widths)),
        max_size_hw=(max(heights), max(widths)),
        gray_share=round(sum(are_gray) / count, 4),
    )


def compare_with_training(
    image: npt.NDArray[np.uint8], stats: TrainingDataStats
) -> tuple[str, ...]:
    """List how an image [H, W, 3] differs from the training images.

    Returns:
        Some of "larger" (more than 2 times the size), "smaller", "gray" and "colored".
    """
    return compare_size_and_color((image.shape[0], image.shape[1]), lambda: is_gray(image), stats)


def compare_size_and_color(
    size_hw: tuple[int, int], is_gray: Callable[[], bool], stats: TrainingDataStats
) -> tuple[str, ...]:
    """Like `compare_with_training`, of an image's size and of whether it is gray."""
    side = sqrt(size_hw[0] * size_hw[1])
    found = []
    if side > SIZE_TOLERANCE * sqrt(stats.max_size_hw[0] * stats.max_size_hw[1]):
        found.append(LARGER)
    if side * SIZE_TOLERANCE < sqrt(stats.min_size_hw[0] * stats.min_size_hw[1]):
        found.append(SMALLER)
    if stats.gray_share in (0, 1) and is_gray() != bool(stats.gray_share):
        found.append(COLORED if stats.gray_share else GRAY)
    return tuple(found)
