"""Which images form which batch of which epoch, decided by the seed alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """The batches of the epoch that `epoch` says, for a loader that outlives the epochs.

    The first `start` of them are passed over: a run that goes on in the middle has seen them.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int) -> None:
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self.epoch = 1
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the current epoch, from the first that is wanted."""
        batches = epoch_batches(
            self._num_samples, self._batch_size, seed=self._seed, epoch=self.epoch
        )
        yield from batches[self.start :]

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, the same in every epoch."""
        batches, rest = divmod(self._num_samples, self._batch_size)
        return batches + (1 if rest > 1 or not batches else 0)


def epoch_batches(num_samples: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Indices 0..num_samples-1 in the random order of an epoch, cut into batches.

    A last batch of a single image joins the one before it, since the network cannot be trained
    on one image at a time and no image shall be lost.

    Args:
        num_samples: Images, at least 2.
        batch_size: Images per batch, at least 2.
        seed: Of the run.
        epoch: Counts from 1.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_samples).tolist()
    batches = [order[i : i + batch_size] for i in range(0, num_samples, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        alone = batches.pop()
        batches[-1] += alone
    return batches
