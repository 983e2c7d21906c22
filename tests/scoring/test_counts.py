from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcnseg.scoring.counts import (
    class_f1,
    class_iou,
    class_precision,
    class_recall,
    count_classes,
    count_confusion,
    mean_iou,
)

K = 4
LABEL_MAPS = arrays(np.uint8, (5, 6), elements=st.sampled_from((0, 1, 2, 3, 255)))
PREDICTIONS = arrays(np.uint8, (5, 6), elements=st.integers(0, K - 1))


@given(LABEL_MAPS, PREDICTIONS)
def test_scores_follow_from_pixel_sets(labels: np.ndarray, predicted: np.ndarray) -> None:
    counts = count_classes(count_confusion(labels, predicted, K))
    known = [
        {(y, x) for y, x in np.ndindex(labels.shape) if labels[y, x] != 255 and map_[y, x] == c}
        for map_ in (labels, predicted)
        for c in range(K)
    ]
    expected = []
    for index in range(K):
        true, found = known[index], known[K + index]
        both, either = len(true & found), len(true | found)
        expected.append(both / either if either else None)
        for value, part, whole in (
            (class_iou(counts)[index], both, either),
            (class_precision(counts)[index], both, len(found)),
            (class_recall(counts)[index], both, len(true)),
            (class_f1(counts)[index], 2 * both, len(true) + len(found)),
        ):
            assert value == pytest.approx(part / whole) if whole else np.isnan(value)
    ious = [iou for iou in expected if iou is not None]
    assert mean_iou(counts) == pytest.approx(np.mean(ious)) if ious else np.isnan(mean_iou(counts))


def test_counts_of_images_add_up() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, K, (2, 8, 8, 8), np.uint8)
    parts = [count_confusion(*pair, K) for pair in zip(labels, predicted, strict=True)]
    whole = count_confusion(labels.reshape(8, 64), predicted.reshape(8, 64), K)
    np.testing.assert_array_equal(np.sum(parts, axis=0), whole)
