"""Average precision of predicted regions, by pycocotools; entry point `score_regions`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

MIN_IOU: Final = 0.5  # of a region with an object, for the region to be correct
MAX_REGIONS: Final = 10**6  # of an image and class; COCO counts the best 100 only

RunLengths = dict[str, Any]


@dataclass(frozen=True)
class ImageRegions:
    """The objects of a label map, and the regions predicted for its image.

    Attributes:
        object_classes: Training index of each object's class.
        object_masks: The objects as COCO's run lengths.
        classes: Training index of each region's class.
        masks: The regions as COCO's run lengths.
        scores: The score of each region.
        confidences: The mean probability of the class over the region's pixels.
        votes: Training index of the region head's most probable class; None for "no object".
    """

    object_classes: Sequence[int]
    object_masks: Sequence[RunLengths]
    classes: Sequence[int]
    masks: Sequence[RunLengths]
    scores: Sequence[float]
    confidences: Sequence[float]
    votes: Sequence[int | None]


@dataclass(frozen=True)
class FilterCurve:
    """What a filter keeps that removes regions with a value below a threshold, at an IoU of 0.5.

    Attributes:
        thresholds: The values of the N regions of all classes, the highest first, [N].
        precision: Fraction of the kept regions that are correct, [N].
        recall: Fraction of the objects that are found, [N].
    """

    thresholds: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]

    def at_recall(self, fraction: float) -> tuple[float, float]:
        """The threshold that keeps a fraction of the recall of all regions, and its precision.

        Of the thresholds that keep it, the one with the highest precision; NaN without any object
        that is found.
        """
        if not self.recall.size or not self.recall[-1]:
            return float("nan"), float("nan")
        enough = np.flatnonzero(self.recall >= fraction * self.recall[-1])
        best = enough[self.precision[enough].argmax()]
        return float(self.thresholds[best]), float(self.precision[best])


@dataclass(frozen=True)
class RegionScores:
    """Scores of the regions of a split; NaN where they are undefined.

    Attributes:
        ap: Average precision over the classes and the IoU thresholds 0.5, 0.55, ..., 0.95.
        ap50: The same at an IoU of 0.5.
        ap50_by_confidence: As `ap50`, with the regions in the order of their mean pixel confidence.
        recall: Fraction of the objects with a region of IoU 0.5, averaged over the classes.
        accuracy: Fraction of the regions whose vote is right: the class of the object with an IoU
            of at least 0.5, or "no object".
        class_ap50: `ap50` of each class, [K].
        by_score: The effect of a filter by the region score.
        by_confidence: That of a filter by the mean pixel confidence.
    """

    ap: float
    ap50: float
    ap50_by_confidence: float
    recall: float
    accuracy: float
    class_ap50: npt.NDArray[np.float64]
    by_score: FilterCurve
    by_confidence: FilterCurve

    @property
    def precision(self) -> float:
        """Fraction of all regions that are correct; NaN without regions."""
        return float(self.by_score.precision[-1]) if self.by_score.precision.size else float("nan")


def score_regions(images: Sequence[ImageRegions], num_classes: int) -> RegionScores:
    """Compute the scores of the regions of a split.

    Source: Lin et al. 2014, "Microsoft COCO", and its evaluation code, with all regions of an image
    instead of the best 100, for objects of all sizes.
    """
    by_score = _evaluate(images, [image.scores for image in images], num_classes)
    by_confidence = _evaluate(images, [image.confidences for image in images], num_classes)
    right = [is_right for image in images for is_right in _judge_votes(image)]
    return RegionScores(
        _mean(by_score["precision"]),
        _mean(by_score["precision"][0]),
        _mean(by_confidence["precision"][0]),
        _mean(by_score["recall"][0]),
        float(np.mean(right)) if right else float("nan"),
        np.array([_mean(by_score["precision"][0, :, k]) for k in range(num_classes)]),
        by_score["curve"],
        by_confidence["curve"],
    )


def _evaluate(
    images: Sequence[ImageRegions], scores: Sequence[Sequence[float]], num_classes: int
) -> dict[str, Any]:
    """Precision [IoU, recall, K, 1, 1] and recall [IoU, K, 1, 1], -1 without objects; the curve."""
    objects = [(image.object_classes, image.object_masks, None) for image in images]
    regions = [
        (image.classes, image.masks, of_image)
        for image, of_image in zip(images, scores, strict=True)
    ]
    with redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        evaluation = COCOeval(
            _to_coco(objects, num_classes), _to_coco(regions, num_classes), "segm"
        )
        evaluation.params.maxDets = [MAX_REGIONS]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, np.inf]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    num_objects = sum(len(image.object_classes) for image in images)
    curve = _to_curve([each for each in evaluation.evalImgs if each is not None], num_objects)
    return {
        "precision": evaluation.eval["precision"],
        "recall": evaluation.eval["recall"],
        "curve": curve,
    }


def _to_curve(matched: Sequence[dict[str, Any]], num_objects: int) -> FilterCurve:
    """The curve over all classes, from COCO's matches of each image and class."""
    values = np.concatenate([[], *(each["dtScores"] for each in matched)])
    is_hit = np.concatenate([[], *(each["dtMatches"][0] > 0 for each in matched)])
    order = np.argsort(-values, kind="stable")
    hits = is_hit[order].cumsum()
    return FilterCurve(values[order], hits / (1 + np.arange(len(hits))), hits / max(num_objects, 1))


def _to_coco(images: Sequence[tuple[Any, Any, Any]], num_classes: int) -> COCO:
    """The classes, masks and scores of each image as a COCO data set."""
    annotations = [
        {
            "image_id": image_id,
            "category_id": class_index,
            "segmentation": mask,
            "area": float(coco_mask.area(mask)),
            "iscrowd": 0,
            "score": score,
        }
        for image_id, (classes, masks, scores) in enumerate(images)
        for class_index, mask, score in zip(
            classes, masks, scores or [None] * len(masks), strict=True
        )
    ]
    data = COCO()
    data.dataset = {
        "images": [
            {"id": i}
            | (dict(zip(("height", "width"), masks[0]["size"], strict=True)) if masks else {})
            for i, (_, masks, _) in enumerate(images)
        ],
        "categories": [{"id": index} for index in range(num_classes)],
        "annotations": [{"id": i, **each} for i, each in enumerate(annotations, 1)],
    }
    data.createIndex()
    return data


def _judge_votes(image: ImageRegions) -> list[bool]:
    """Whether each vote is the class of the object it overlaps most, or None if it is below 0.5."""
    if not image.masks:
        return []
    best: list[int | None] = [None] * len(image.masks)
    if image.object_masks:
        iou = coco_mask.iou(image.masks, image.object_masks, [False] * len(image.object_masks))
        for i, row in enumerate(iou):
            if row.max() >= MIN_IOU:
                best[i] = image.object_classes[int(row.argmax())]
    return [vote == right for vote, right in zip(image.votes, best, strict=True)]


def _mean(values: npt.NDArray[np.float64]) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
