"""How much a picture is like those that a network was trained on.

Entry points: `describe_pictures` for the training, `differences` for the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dcnseg.checkpoint import SeenPictures
from dcnseg.data.image_io import read_image

MOST_EXAMPLES: Final = 16
# Training sees every picture at half to twice its size, unless told otherwise.
SIZE_TOLERANCE: Final = 2.0
LARGER, SMALLER, GREY, COLOURED = "larger", "smaller", "grey", "coloured"


def describe_pictures(paths: Sequence[Path]) -> SeenPictures:
    """What up to 16 pictures, evenly spread over `paths`, are like.

    Raises:
        DataError: a picture cannot be read; the message names it.
    """
    count = min(len(paths), MOST_EXAMPLES)
    images = (read_image(paths[i * len(paths) // count]) for i in range(count))
    looked = [(image.shape[0], image.shape[1], is_grey(image)) for image in images]
    heights, widths, are_grey = zip(*looked, strict=True)
    return SeenPictures(
        num_images=len(paths),
        min_size_hw=(min(heights), min(widths)),
        max_size_hw=(max(heights), max(widths)),
        grey_share=round(sum(are_grey) / count, 4),
    )


def differences(image: npt.NDArray[np.uint8], seen: SeenPictures) -> tuple[str, ...]:
    """In what a picture is much unlike the training's: some of "larger", "smaller", and so on.

    Args:
        image: RGB, uint8 [H, W, 3].
        seen: What the training pictures were like.
    """
    side = sqrt(image.shape[0] * image.shape[1])
    found = []
    if side > SIZE_TOLERANCE * sqrt(seen.max_size_hw[0] * seen.max_size_hw[1]):
        found.append(LARGER)
    if side * SIZE_TOLERANCE < sqrt(seen.min_size_hw[0] * seen.min_size_hw[1]):
        found.append(SMALLER)
    if seen.grey_share in (0, 1) and is_grey(image) != bool(seen.grey_share):
        found.append(COLOURED if seen.grey_share else GREY)
    return tuple(found)


def is_grey(image: npt.NDArray[np.uint8]) -> bool:
    """Whether an RGB picture [H, W, 3] has no colours."""
    # A few rows first: most pictures with colours show them there.
    for part in (image[:: max(1, len(image) // 8)], image):
        if not ((part[..., 0] == part[..., 1]) & (part[..., 0] == part[..., 2])).all():
            return False
    return True
