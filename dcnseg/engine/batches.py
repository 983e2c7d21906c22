"""Which pictures form which batch of which epoch, decided by the seed alone."""

from __future__ import annotations

import numpy as np


def epoch_batches(num_samples: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices 0..num_samples-1 in the random order of an epoch, cut into batches.

    A last batch of a single picture joins the one before it, since the network cannot be trained
    on one picture at a time and no picture shall be lost.

    Args:
        num_samples: Pictures, at least 2.
        batch_size: Pictures per batch, at least 2.
        seed: Of the run.
        epoch: Counts from 1.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_samples).tolist()
    batches = [order[i : i + batch_size] for i in range(0, num_samples, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        alone = batches.pop()
        batches[-1] += alone
    return batches
