"""What the pixels of a label map belong to; entry point `PixelGroups.from_labels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import IGNORE_INDEX, ClassMap
from dcnseg.scoring.counts import Floats, LabelIndices
from dcnseg.scoring.objects import SIZES, find_objects

Integers = npt.NDArray[np.int64]

SIZE_NAMES: Final = (*SIZES, "background")
DISTANCE_LIMITS: Final = (
    4,
    8,
    16,
    32,
    64,
)  # pixels of the image; upper limits, the last bin is open
DISTANCE_NAMES: Final = (
    *(f"{low}-{high}" for low, high in zip((0, *DISTANCE_LIMITS), DISTANCE_LIMITS, strict=False)),
    f"{DISTANCE_LIMITS[-1]}+",
)

# Numbers of a point that is on no object and no background.
NO_OBJECT: Final = 0  # an object below `MIN_AREA`
IGNORED: Final = -1  # an ignored pixel
OUTSIDE: Final = -2  # outside the image
NOT_FINITE: Final = -3


@dataclass(frozen=True)
class PixelGroups:
    """The object, the size, the class and the distance from the border of every pixel.

    Attributes:
        numbers: Objects are 1 to N, a background class is N + 1 + its training index, and the other
            pixels are `NO_OBJECT` or `IGNORED`, int32 [H, W].
        labels: Training indices, uint8 [H, W]; 255 is ignored.
        sizes: Index in `SIZE_NAMES` by number, [N + 1 + K]; one more for `NO_OBJECT`.
        areas: Of the objects, in pixels, [N].
        border_distance_px: Distance of the pixel's center from the border of its own object or
            area, at least 0.5, float32 [H, W]. The image's border is none.
        num_classes: K.
    """

    numbers: npt.NDArray[np.int32]
    labels: LabelIndices
    sizes: Integers
    areas: Integers
    border_distance_px: npt.NDArray[np.float32]
    num_classes: int

    @classmethod
    def from_labels(cls, labels: LabelIndices, class_map: ClassMap) -> PixelGroups:
        """Group the pixels of a label map of training indices, uint8 [H, W]; 255 is ignored."""
        objects = find_objects(labels, class_map.object_indices)
        count = len(objects)
        is_object = np.isin(np.arange(256), class_map.object_indices)
        numbers = objects.numbers.copy()
        is_background = ~is_object[labels]
        numbers[is_background] = count + 1 + labels[is_background].astype(np.int32)
        numbers[labels == IGNORE_INDEX] = IGNORED
        limits = list(SIZES.values())[:-1]
        sizes = np.full(count + 1 + class_map.num_classes, len(SIZES), np.int64)
        sizes[NO_OBJECT] = len(SIZE_NAMES)
        sizes[1 : count + 1] = np.searchsorted(limits, objects.areas, side="right")
        distance = _measure_border_distance(numbers)
        return cls(numbers, labels, sizes, objects.areas, distance, class_map.num_classes)

    def cells_at(self, rows: Integers, columns: Integers) -> Integers:
        """Return the flat index of the cell of each pixel; `IGNORED` for ignored ones."""
        numbers = self.numbers[rows, columns]
        is_known = numbers != IGNORED
        bins = np.searchsorted(
            DISTANCE_LIMITS, self.border_distance_px[rows, columns], side="right"
        )
        classes = np.where(is_known, self.labels[rows, columns], 0)
        place = self.sizes[np.where(is_known, numbers, 0)], classes.astype(np.int64), bins
        return np.where(
            is_known, np.ravel_multi_index(place, get_cell_shape(self.num_classes)), IGNORED
        )

    def numbers_at(self, points_yx: Floats) -> npt.NDArray[np.int32]:
        """Return the number of the pixel at each point, [...].

        Args:
            points_yx: In pixels of the image, (0, 0) the center of the first, [..., 2].

        Returns:
            As `numbers`, or `OUTSIDE`, or `NOT_FINITE`, [...].
        """
        height, width = self.numbers.shape
        rows, columns = np.moveaxis(np.floor(points_yx + 0.5), -1, 0)
        is_inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        # NaN and infinity must not be cast.
        row_indices, column_indices = (
            np.where(is_inside, places, 0).astype(np.int64) for places in (rows, columns)
        )
        found = np.where(is_inside, self.numbers[row_indices, column_indices], OUTSIDE)
        is_finite = np.isfinite(rows) & np.isfinite(columns)
        return np.where(is_finite, found, NOT_FINITE).astype(np.int32)


def get_cell_shape(num_classes: int) -> tuple[int, int, int]:
    """Return the shape of the cells: sizes (the last is `NO_OBJECT`), classes, distance bins."""
    return len(SIZE_NAMES) + 1, num_classes, len(DISTANCE_NAMES)


def _measure_border_distance(numbers: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Measure the distance from the edge of the nearest pixel that has a different neighbor."""
    is_border = np.zeros(numbers.shape, np.bool_)
    for first, second in (
        (np.s_[:-1], np.s_[1:]),
        (np.s_[:, :-1], np.s_[:, 1:]),
    ):
        differs: Any = numbers[first] != numbers[second]
        is_border[first] |= differs
        is_border[second] |= differs
    if not is_border.any():
        return np.full(numbers.shape, np.inf, np.float32)
    # The nearest border pixel is on the own side: the way to any other crosses the own border.
    distance = cv2.distanceTransform(
        (~is_border).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    return np.asarray(distance, np.float32) + np.float32(0.5)
