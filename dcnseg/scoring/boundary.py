"""Pixel counts near the boundaries of the classes; entry point `count_boundaries`.

Source: Cheng et al. 2021, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation".
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.scoring.counts import Counts, LabelIndices

BAND_SHARE: Final = 0.02  # of the image diagonal, as in the paper


def count_boundaries(
    labels: LabelIndices,
    predicted: LabelIndices,
    num_classes: int,
    *,
    band_share: float = BAND_SHARE,
) -> Counts:
    """Count the pixels of each class that lie within a band along the inside of its boundary.

    The IoU of these counts is the boundary IoU. The image border is a boundary, as in the paper,
    and so is the border of ignored pixels.

    Args:
        labels: Training indices, uint8 [H, W]; 255 is ignored.
        predicted: Training indices, uint8 [H, W].
        num_classes: K.
        band_share: Width of the band as a fraction of the image diagonal; at least one pixel.

    Returns:
        Correct, labeled and predicted pixels, int64 [K, 3].
    """
    width_px = max(1, round(band_share * float(np.hypot(*labels.shape))))
    seen = np.where(labels == IGNORE_INDEX, np.uint8(IGNORE_INDEX), predicted)
    counts = np.zeros((num_classes, 3), np.int64)
    for index in np.union1d(labels, seen):
        if index < num_classes:
            pair = labels == index, seen == index
            left, top, width, height = cv2.boundingRect((pair[0] | pair[1]).view(np.uint8))
            box = slice(top, top + height), slice(left, left + width)  # outside is no class
            true, found = (_boundary_band(is_class[box], width_px) for is_class in pair)
            counts[index] = (true & found).sum(), true.sum(), found.sum()
    return counts


def _boundary_band(is_class: npt.NDArray[np.bool_], width_px: int) -> npt.NDArray[np.bool_]:
    """Pixels of a class at most `width_px` (chessboard distance) from its outside."""
    padded = np.pad(is_class.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_C, 3)[1:-1, 1:-1]
    band: npt.NDArray[np.bool_] = is_class & (distance <= width_px)
    return band
