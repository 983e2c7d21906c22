"""Confidence intervals over images; entry point `compare_mean_iou`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from dcnseg.scoring.counts import Counts, Floats, mean_iou

RESAMPLES: Final = 2000


@dataclass(frozen=True)
class Interval:
    """A difference and its confidence interval."""

    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of zero."""
        return self.low > 0 or self.high < 0


def compare_mean_iou(
    first: Counts, second: Counts, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Estimate the difference in mean IoU of `first` over `second` by a paired bootstrap.

    The images are drawn with replacement, the same for all runs, and so are the runs of each side.
    The mean IoU of a run is that of the drawn images together, and runs are averaged.

    Args:
        first: Counts of the images of each run, int64 [runs, N, K, 3].
        second: The same of other runs on the same images, int64 [runs, N, K, 3].
        level: Confidence level of the interval, in (0, 1).
        seed: Of the random draws.

    Returns:
        The difference over all images, and its interval; NaN bounds if no draw has a score.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentiles).
    """
    num_images = first.shape[1]
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(num_images, np.full(num_images, 1 / num_images), RESAMPLES)
    of_first, of_second = (_resampled_mean_iou(side, draws, rng) for side in (first, second))
    differences = (of_first - of_second)[~np.isnan(of_first - of_second)]
    tail = 50 * (1 - level)
    bounds = np.percentile(differences, (tail, 100 - tail)) if differences.size else (np.nan,) * 2
    whole = mean_iou(first.sum(1)).mean() - mean_iou(second.sum(1)).mean()
    return Interval(float(whole), float(bounds[0]), float(bounds[1]))


def _resampled_mean_iou(counts: Counts, draws: Counts, rng: np.random.Generator) -> Floats:
    """The mean IoU of each draw of images, averaged over a draw of the runs, [draws]."""
    num_runs, num_images, num_classes, _ = counts.shape
    flat = counts.reshape(num_runs, num_images, -1).astype(np.float64)  # exact below 2**53
    sums = draws.astype(np.float64) @ flat  # [runs, draws, K * 3]
    of_runs = mean_iou(sums.reshape(num_runs, len(draws), num_classes, 3))  # [runs, draws]
    picked = rng.integers(num_runs, size=of_runs.shape)
    return np.asarray(np.take_along_axis(of_runs, picked, axis=0).mean(0))


def rank_correlation(first: Floats, second: Floats) -> float:
    """Spearman's rank correlation of two samples [N], in [-1, 1].

    NaN below three values, or if all values of a sample are equal.
    """
    ranks = np.stack([_ranks(first), _ranks(second)])
    if len(first) < 3 or (np.ptp(ranks, axis=1) == 0).any():
        return float("nan")
    return float(np.atleast_2d(np.corrcoef(ranks))[0, 1])


def _ranks(values: Floats) -> Floats:
    """The rank of each value; equal ones share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])
