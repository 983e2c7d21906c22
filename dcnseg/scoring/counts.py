"""Pixel counts of a label map and a prediction, and the IoU that follows from them.

The counts of K classes are int64 [..., K, 3]: the correct, the labeled and the predicted pixels of
each class. The counts of several images add up to those of a data set.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import IGNORE_INDEX

CORRECT: Final = 0
LABELED: Final = 1
PREDICTED: Final = 2

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
LabelIndices = npt.NDArray[np.uint8]


def count_confusion(labels: LabelIndices, predicted: LabelIndices, num_classes: int) -> Counts:
    """Count pixels by true (row) and predicted class (column), [K, K], without ignored pixels.

    Args:
        labels: Training indices, uint8 [H, W]; 255 is ignored.
        predicted: Training indices, uint8 [H, W], below `num_classes`.
        num_classes: K.
    """
    is_labeled = labels != IGNORE_INDEX
    pairs = labels[is_labeled].astype(np.int64) * num_classes + predicted[is_labeled]
    counts = np.bincount(pairs, minlength=num_classes * num_classes)
    return counts.reshape(num_classes, num_classes)


def count_classes(confusion: Counts) -> Counts:
    """Reduce a confusion matrix [K, K] to the counts of each class, [K, 3]."""
    return np.stack([np.diag(confusion), confusion.sum(1), confusion.sum(0)], axis=-1)


def class_iou(counts: npt.NDArray[Any]) -> Floats:
    """Intersection over union, [..., K]; NaN for a class neither labeled nor predicted."""
    correct = counts[..., CORRECT]
    return _ratio(correct, counts[..., LABELED] + counts[..., PREDICTED] - correct)


def class_precision(counts: Counts) -> Floats:
    """Fraction of the predicted pixels that are correct, [..., K]; NaN without any."""
    return _ratio(counts[..., CORRECT], counts[..., PREDICTED])


def class_recall(counts: Counts) -> Floats:
    """Fraction of the labeled pixels that are predicted, [..., K]; NaN without any."""
    return _ratio(counts[..., CORRECT], counts[..., LABELED])


def class_f1(counts: Counts) -> Floats:
    """Harmonic mean of precision and recall, [..., K]; NaN if neither labeled nor predicted."""
    return _ratio(2 * counts[..., CORRECT], counts[..., LABELED] + counts[..., PREDICTED])


def mean_iou(counts: npt.NDArray[Any]) -> Any:
    """Mean IoU over the classes that are labeled or predicted, [...]; NaN if there are none."""
    iou = class_iou(counts)
    known = ~np.isnan(iou)
    return _ratio(np.where(known, iou, 0.0).sum(-1), known.sum(-1))


def _ratio(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(part / np.asarray(whole, np.float64))
