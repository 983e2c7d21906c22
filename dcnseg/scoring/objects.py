"""Scores of single objects, by their size; entry points `score_objects` and `mean_iou_by_size`.

An object is a connected component (8 neighbors) of a class in the label map.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import cc3d
import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.scoring.counts import LabelIndices

# Upper limits of the area in pixels, as in COCO.
SIZES: Final[Mapping[str, float]] = {"small": 32**2, "medium": 96**2, "large": np.inf}
MIN_AREA: Final = 16  # pixels; smaller components are mostly annotation noise


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """An object of a label map, and how well it is predicted."""

    class_index: int
    area: int  # pixels
    iou: float

    @property
    def size(self) -> str:
        """Name in SIZES."""
        return next(name for name, limit in SIZES.items() if self.area < limit)


@dataclass(frozen=True)
class Objects:
    """The N objects of a label map; the number of an object is its row + 1.

    Attributes:
        numbers: The number of the object at every pixel, 0 for none, int32 [H, W].
        class_indices: Training index of each object's class, [N].
        areas: In pixels, [N].
        boxes_xyxy: Left, top, right and bottom in pixels, the last two exclusive, [N, 4].
    """

    numbers: npt.NDArray[np.int32]
    class_indices: npt.NDArray[np.int64]
    areas: npt.NDArray[np.int64]
    boxes_xyxy: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.areas)

    def without(self, is_removed: npt.NDArray[np.bool_]) -> Objects:
        """Remove objects, and number the others anew; `is_removed` is [N]."""
        kept = ~is_removed
        table = np.zeros(len(self) + 1, np.int32)
        table[1:][kept] = 1 + np.arange(kept.sum())
        return Objects(
            table[self.numbers], self.class_indices[kept], self.areas[kept], self.boxes_xyxy[kept]
        )


def find_objects(
    labels: LabelIndices, classes: Collection[int], min_area: int = MIN_AREA
) -> Objects:
    """Find the objects of the given classes; class by class, from top to bottom, left to right.

    Args:
        labels: Training indices, uint8 [H, W].
        classes: Training indices of the classes with objects, from `ClassMap.object_indices`.
        min_area: Objects with fewer pixels are ignored.
    """
    codes = np.zeros(256, np.uint8)  # 0: no object
    codes[list(classes)] = 1 + np.array(list(classes), np.uint8)
    coded = codes[labels]
    found, count = cc3d.connected_components(coded, connectivity=8, return_N=True)
    statistics = cc3d.statistics(found, no_slice_conversion=True)
    areas = statistics["voxel_counts"].astype(np.int64)
    top, bottom, left, right = statistics["bounding_boxes"].astype(np.int64).T
    class_indices = np.zeros(count + 1, np.int64)
    class_indices[found] = coded
    class_indices -= 1
    kept = 1 + np.flatnonzero(areas[1:] >= min_area)
    kept = kept[np.lexsort((left[kept], top[kept], class_indices[kept]))]
    table = np.zeros(count + 1, np.int32)
    table[kept] = 1 + np.arange(len(kept))
    boxes = np.stack([left, top, right + 1, bottom + 1], axis=1)[kept]
    return Objects(table[found], class_indices[kept], areas[kept], boxes)


def score_objects(
    labels: LabelIndices, predicted: LabelIndices, classes: Collection[int]
) -> list[ObjectScore]:
    """Compute the IoU of each object with the predicted regions of its class that it touches.

    A predicted region may touch several objects; its pixels on one of them are no errors of the
    others. Predicted regions that touch no object are not counted, and neither are objects below 16
    pixels.

    Args:
        labels: Training indices, uint8 [H, W]; 255 is ignored.
        predicted: Training indices, uint8 [H, W].
        classes: Training indices of the classes with objects, from `ClassMap.object_indices`.
    """
    seen = np.where(labels == IGNORE_INDEX, np.uint8(IGNORE_INDEX), predicted)
    scores = []
    for index in np.unique(labels):
        if index in classes:
            pair = labels == index, seen == index
            left, top, width, height = cv2.boundingRect((pair[0] | pair[1]).view(np.uint8))
            box = slice(top, top + height), slice(left, left + width)
            scores += _score_class(int(index), pair[0][box], pair[1][box])
    return scores


def _score_class(
    index: int, is_labeled: npt.NDArray[np.bool_], is_predicted: npt.NDArray[np.bool_]
) -> list[ObjectScore]:
    found = find_objects(is_labeled.view(np.uint8), (1,))
    objects = found.numbers
    predicted = np.ascontiguousarray(is_predicted).view(np.uint8)
    num_regions, regions = cv2.connectedComponents(predicted, connectivity=8)
    beside = np.bincount(regions[~is_labeled], minlength=num_regions)  # pixels of no object
    is_shared = (objects > 0) & (regions > 0)
    numbers = objects[is_shared].astype(np.int64) * num_regions + regions[is_shared]
    pairs, shared = np.unique(numbers, return_counts=True)  # not all pairs: there may be 10**9
    touching, region = np.divmod(pairs, num_regions)
    correct = np.bincount(touching, shared, len(found) + 1)
    wrong = np.bincount(touching, beside[region], len(found) + 1)
    return [
        ObjectScore(index, int(area), float(correct[i] / (area + wrong[i])))
        for i, area in enumerate(found.areas, 1)
    ]


def mean_iou_by_size(scores: Iterable[ObjectScore]) -> dict[str, tuple[int, float]]:
    """The number of objects of each size, and their mean IoU (NaN without any)."""
    ious: dict[str, list[float]] = {size: [] for size in SIZES}
    for score in scores:
        ious[score.size].append(score.iou)
    return {
        size: (len(values), float(np.mean(values)) if values else float("nan"))
        for size, values in ious.items()
    }
