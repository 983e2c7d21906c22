from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcnseg.scoring.boundary import count_boundaries
from dcnseg.scoring.counts import class_iou

K = 3


def erode(mask: np.ndarray, width_px: int) -> np.ndarray:
    """The band as the paper computes it: what `width_px` erosions remove."""
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width_px)[1:-1, 1:-1]
    return np.asarray(mask & (inner == 0))


MAPS = arrays(np.uint8, (14, 17), elements=st.sampled_from((0, 0, 0, 0, 1, 2, 255)))


@given(MAPS, MAPS, st.sampled_from((0.01, 0.1, 0.2)))
def test_equals_the_erosion_of_the_paper(
    labels: np.ndarray, other: np.ndarray, share: float
) -> None:
    predicted = np.where(other == 255, 0, other).astype(np.uint8)
    width_px = max(1, round(share * np.hypot(14, 17)))
    counts = count_boundaries(labels, predicted, K, band_share=share)
    for index in range(K):
        true = erode(labels == index, width_px)
        found = erode((predicted == index) & (labels != 255), width_px)
        assert counts[index].tolist() == [(true & found).sum(), true.sum(), found.sum()]


def test_is_stricter_than_iou_for_a_large_object() -> None:
    labels, predicted = np.zeros((2, 200, 200), np.uint8)
    labels[40:160, 40:160] = 1
    predicted[44:164, 44:164] = 1
    band = class_iou(count_boundaries(labels, predicted, 2))[1]
    assert band < 0.4
    assert class_iou(count_boundaries(labels, labels, 2)) == pytest.approx([1, 1])
