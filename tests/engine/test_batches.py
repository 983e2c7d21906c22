from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dcnseg.engine.batches import EpochBatches, epoch_batches


@given(st.integers(2, 200), st.integers(2, 17), st.integers(0, 5), st.integers(1, 5))
def test_every_image_once_and_never_one_alone(
    num_samples: int, batch_size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(num_samples, batch_size, seed=seed, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(num_samples))
    assert all(2 <= len(batch) <= batch_size + 1 for batch in batches)
    assert batches == epoch_batches(num_samples, batch_size, seed=seed, epoch=epoch)
    sampler = EpochBatches(num_samples, batch_size, seed=seed)
    sampler.epoch = epoch
    assert list(sampler) == batches
    assert len(sampler) == len(batches)


def test_epochs_differ() -> None:
    orders = [epoch_batches(50, 4, seed=0, epoch=epoch) for epoch in (1, 2)]
    assert orders[0] != orders[1]
