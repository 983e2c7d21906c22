from __future__ import annotations

import numpy as np
import pytest

from dcnseg.scoring.bootstrap import compare_mean_iou, rank_correlation
from dcnseg.scoring.counts import Counts, mean_iou


def make_counts(accuracy: float, *, images: int = 40, runs: int = 2, seed: int = 0) -> Counts:
    """Counts of two classes whose pixels are correct with a probability that varies by image."""
    rng = np.random.default_rng(seed)
    share = np.clip(rng.normal(accuracy, 0.05, (1, images, 1)), 0, 1)
    labeled = np.full((runs, images, 2), 1000)
    correct = rng.binomial(1000, np.broadcast_to(share, labeled.shape))
    return np.stack([correct, labeled, correct + (1000 - correct)[..., ::-1]], axis=-1)


def test_the_difference_is_that_of_the_whole_split() -> None:
    first, second = make_counts(0.9), make_counts(0.8)
    interval = compare_mean_iou(first, second)
    expected = mean_iou(first.sum(1)).mean() - mean_iou(second.sum(1)).mean()
    assert interval.difference == pytest.approx(expected)
    assert interval.low < interval.difference < interval.high
    assert interval.excludes_zero


def test_pairing_makes_the_interval_narrow() -> None:
    """The images differ by far more than the variants; the difference is still seen."""
    first = make_counts(0.80, runs=1, seed=1)
    second = first.copy()
    second[..., 0] -= 10
    paired = compare_mean_iou(first, second)
    shuffled = compare_mean_iou(first, second[:, np.random.default_rng(3).permutation(40)])
    assert paired.excludes_zero
    assert not shuffled.excludes_zero
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)


def test_equal_variants_differ_by_nothing() -> None:
    counts = make_counts(0.8, runs=1)
    interval = compare_mean_iou(counts, counts)
    assert (interval.difference, interval.low, interval.high) == (0, 0, 0)
    assert not interval.excludes_zero


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Two variants of equal accuracy: about 95 % of the intervals contain zero."""
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        both = [
            np.stack([c, np.full(c.shape, 500), c + (500 - c)[..., ::-1]], axis=-1)
            for c in (rng.binomial(500, 0.8, (1, 50, 2)) for _ in "ab")
        ]
        hits += not compare_mean_iou(both[0], both[1], seed=seed).excludes_zero
    assert 34 <= hits <= 40


def test_runs_that_differ_widen_the_interval() -> None:
    steady = make_counts(0.9, runs=3)
    unsteady = steady.copy()
    for run, loss in enumerate((-60, 0, 60)):
        unsteady[run, ..., 0] += loss
    narrow, wide = (compare_mean_iou(runs, make_counts(0.8)) for runs in (steady, unsteady))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_images_without_labels_have_no_interval() -> None:
    nothing = np.zeros((1, 3, 2, 3), np.int64)
    interval = compare_mean_iou(nothing, nothing)
    assert np.isnan([interval.difference, interval.low, interval.high]).all()
    assert not interval.excludes_zero


def test_rank_correlation() -> None:
    values = np.array([3.0, 1.0, 4.0, 1.5, 9.0])
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert np.isnan(rank_correlation(values[:2], values[:2]))
    assert np.isnan(rank_correlation(values, np.ones(5)))


def test_equal_values_share_a_rank() -> None:
    first, second = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(first, second) == pytest.approx(9 / np.sqrt(90))
