"""The regions of an image for their evaluation; entry point `collect_regions`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.region_files import encode_mask
from dcnseg.scoring.counts import LabelIndices
from dcnseg.scoring.objects import Objects, find_objects
from dcnseg.scoring.region_scores import ImageRegions, RunLengths


def collect_regions(labels: LabelIndices, prediction: Prediction, min_area: int) -> ImageRegions:
    """Return the objects of a label map and the predicted regions.

    Regions of which more than half is ignored in the label map are left out.

    Args:
        labels: Training indices, uint8 [H, W].
        prediction: The prediction for the image, with regions.
        min_area: Objects with fewer pixels are ignored.
    """
    assert prediction.regions is not None
    assert prediction.region_numbers is not None
    objects = find_objects(labels, prediction.class_map.object_indices, min_area)
    numbers = prediction.region_numbers
    ignored = np.bincount(numbers[labels == IGNORE_INDEX], minlength=len(prediction.regions) + 1)
    kept = [
        (number, region)
        for number, region in enumerate(prediction.regions, 1)
        if 2 * ignored[number] <= region.area
    ]
    return ImageRegions(
        object_classes=objects.class_indices.tolist(),
        object_masks=_encode_objects(objects),
        classes=[region.class_index for _, region in kept],
        masks=[_encode(numbers, number, region.box_xyxy) for number, region in kept],
        scores=[region.score for _, region in kept],
        confidences=[region.confidence for _, region in kept],
        votes=[region.voted_index for _, region in kept],
    )


def _encode_objects(objects: Objects) -> list[RunLengths]:
    return [
        _encode(objects.numbers, number, box)
        for number, box in enumerate(objects.boxes_xyxy.tolist(), 1)
    ]


def _encode(
    numbers: npt.NDArray[np.int32], number: int, box_xyxy: tuple[int, int, int, int]
) -> RunLengths:
    left, top, right, bottom = box_xyxy
    return encode_mask(numbers[top:bottom, left:right] == number, (top, left), numbers.shape)
