"""How much an image is like those that a network was trained on.

Entry points: `summarize_training_images` for the training, `differences` for the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dcnseg.checkpoint import TrainingDataStats
from dcnseg.data.image_io import read_image

MOST_EXAMPLES: Final = 16
# Training sees every image at half to twice its size, unless told otherwise.
SIZE_TOLERANCE: Final = 2.0
LARGER, SMALLER, GRAY, COLORED = "larger", "smaller", "gray", "colored"


def summarize_training_images(paths: Sequence[Path]) -> TrainingDataStats:
    """What up to 16 images, evenly spread over `paths`, are like.

    Raises:
        DataError: an image cannot be read; the message names it.
    """
    count = min(len(paths), MOST_EXAMPLES)
    images = (read_image(paths[i * len(paths) // count]) for i in range(count))
    inspected = [(image.shape[0], image.shape[1], is_gray(image)) for image in images]
    heights, widths, are_gray = zip(*inspected, strict=True)
    return TrainingDataStats(
        num_images=len(paths),
        min_size_hw=(min(heights), min(widths)),
        max_size_hw=(max(heights), max(widths)),
        gray_share=round(sum(are_gray) / count, 4),
    )


def differences_from_training(
    image: npt.NDArray[np.uint8], seen: TrainingDataStats
) -> tuple[str, ...]:
    """In what an image is much unlike the training's: some of "larger", "smaller", and so on.

    Args:
        image: RGB, uint8 [H, W, 3].
        seen: What the training images were like.
    """
    side = sqrt(image.shape[0] * image.shape[1])
    found = []
    if side > SIZE_TOLERANCE * sqrt(seen.max_size_hw[0] * seen.max_size_hw[1]):
        found.append(LARGER)
    if side * SIZE_TOLERANCE < sqrt(seen.min_size_hw[0] * seen.min_size_hw[1]):
        found.append(SMALLER)
    if seen.gray_share in (0, 1) and is_gray(image) != bool(seen.gray_share):
        found.append(COLORED if seen.gray_share else GRAY)
    return tuple(found)


def is_gray(image: npt.NDArray[np.uint8]) -> bool:
    """Whether an RGB image [H, W, 3] has no colors."""
    # A few rows first: most images with colors show them there.
    for part in (image[:: max(1, len(image) // 8)], image):
        if not ((part[..., 0] == part[..., 1]) & (part[..., 0] == part[..., 2])).all():
            return False
    return True
