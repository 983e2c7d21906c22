"""The scores of a split: `Scores`, and those of its images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnseg.scoring.counts import (
    Counts,
    Floats,
    class_f1,
    class_iou,
    class_precision,
    class_recall,
    count_classes,
    mean_iou,
)
from dcnseg.scoring.objects import ObjectScore, mean_iou_by_size
from dcnseg.scoring.region_scores import RegionScores

KEPT_RECALL: Final = 0.95  # of the regions' recall, by the filter that is recommended


@dataclass(frozen=True)
class ImageScores:
    """The scores of one image.

    Attributes:
        name: Stem of the image.
        counts: Correct, labeled and predicted pixels of each class, int64 [K, 3].
        boundary: The same within the boundary bands, or None if it was not computed.
        objects: The objects of the label map, if they were computed.
    """

    name: str
    counts: Counts
    boundary: Counts | None = None
    objects: tuple[ObjectScore, ...] = ()

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that are labeled or predicted in the image."""
        return float(mean_iou(self.counts))

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of the labeled pixels that are predicted correctly."""
        correct, labeled, _ = self.counts.sum(0)
        return float(correct / labeled) if labeled else float("nan")

    @property
    def mean_boundary_iou(self) -> float:
        """Mean boundary IoU over the classes; NaN if it was not computed."""
        return float("nan") if self.boundary is None else float(mean_iou(self.boundary))


@dataclass(frozen=True)
class Scores:
    """The scores of a split.

    Attributes:
        confusion: Pixels by true (row) and predicted class (column), int64 [K, K].
        names: Names of the K classes.
        images: The scores of each image, in the order of the split.
        regions: The scores of the regions; None for a network without a region head.
        unfiltered_mean_iou: Mean IoU with the regions that were removed for their low score; None
            if none are removed.
    """

    confusion: npt.NDArray[np.int64]
    names: tuple[str, ...]
    images: tuple[ImageScores, ...] = ()
    regions: RegionScores | None = None
    unfiltered_mean_iou: float | None = None

    @cached_property
    def counts(self) -> Counts:
        """Correct, labeled and predicted pixels of each class, [K, 3]."""
        return count_classes(self.confusion)

    @property
    def class_iou(self) -> Floats:
        """Intersection over union per class, [K]; NaN for a class neither true nor predicted."""
        return class_iou(self.counts)

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes; classes neither true nor predicted are ignored."""
        return float(mean_iou(self.counts))

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of the labeled pixels that are predicted correctly."""
        total = self.confusion.sum()
        return float(np.trace(self.confusion) / total) if total else float("nan")

    @property
    def image_counts(self) -> Counts:
        """The counts of every image, [N, K, 3]."""
        return np.stack([image.counts for image in self.images])

    @property
    def boundary_iou(self) -> Floats | None:
        """Boundary IoU per class, [K], or None if it was not computed."""
        bands = self._boundary_counts
        return None if bands is None else class_iou(bands)

    @cached_property
    def _boundary_counts(self) -> Counts | None:
        bands = [image.boundary for image in self.images if image.boundary is not None]
        return np.sum(bands, axis=0) if bands else None

    @property
    def mean_boundary_iou(self) -> float:
        """Mean boundary IoU over the classes; NaN if it was not computed."""
        bands = self._boundary_counts
        return float("nan") if bands is None else float(mean_iou(bands))

    @property
    def iou_by_size(self) -> dict[str, tuple[int, float]]:
        """The number of objects of each size and their mean IoU; see `score_objects`."""
        return mean_iou_by_size(score for image in self.images for score in image.objects)

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON values; undefined scores are None."""
        scores: dict[str, Any] = {
            "mean_iou": _number(self.mean_iou),
            "pixel_accuracy": _number(self.pixel_accuracy),
            "class_iou": self._by_class(self.class_iou),
            "labelled_pixels": int(self.confusion.sum()),
        }
        if self.unfiltered_mean_iou is not None:
            scores["unfiltered_mean_iou"] = _number(self.unfiltered_mean_iou)
        if self.regions is not None:
            scores["regions"] = self._describe_regions(self.regions)
        return scores

    def _describe_regions(self, regions: RegionScores) -> dict[str, Any]:
        threshold, precision = regions.by_score.at_recall(KEPT_RECALL)
        confidence, precision_by_confidence = regions.by_confidence.at_recall(KEPT_RECALL)
        numbers = {
            "ap": regions.ap,
            "ap50": regions.ap50,
            "ap50_by_confidence": regions.ap50_by_confidence,
            "recall": regions.recall,
            "accuracy": regions.accuracy,
            "precision": regions.precision,
            "filter_score": threshold,
            "filtered_precision": precision,
            "filter_confidence": confidence,
            "filtered_precision_by_confidence": precision_by_confidence,
        }
        return {name: _number(value) for name, value in numbers.items()} | {
            "class_ap50": self._by_class(regions.class_ap50)
        }

    def to_detailed_dict(self) -> dict[str, Any]:
        """As `to_dict`, with precision, recall, F1, boundary IoU, and IoU by object size."""
        details = self.to_dict() | {
            "class_precision": self._by_class(class_precision(self.counts)),
            "class_recall": self._by_class(class_recall(self.counts)),
            "class_f1": self._by_class(class_f1(self.counts)),
            "confusion": self.confusion.tolist(),
        }
        boundary = self.boundary_iou
        if boundary is not None:
            details["mean_boundary_iou"] = _number(self.mean_boundary_iou)
            details["class_boundary_iou"] = self._by_class(boundary)
            details["iou_by_size"] = {
                size: {"objects": count, "mean_iou": _number(iou)}
                for size, (count, iou) in self.iou_by_size.items()
            }
        return details

    def _by_class(self, values: Floats) -> dict[str, float | None]:
        return {name: _number(value) for name, value in zip(self.names, values, strict=True)}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
