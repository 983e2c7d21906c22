"""Batches, and worker processes that die or run out of files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import SegmentationDataset
from dcnseg.engine import loading
from dcnseg.engine.distributed import World
from dcnseg.engine.loading import EpochBatches, TrainingLoader
from dcnseg.engine.training_data import find_training_splits
from dcnseg.errors import DataError, TrainingError
from dcnseg.processes import Process
from tests.conftest import small_config
from tests.engine.runs import assert_equal


@given(st.integers(2, 200), st.integers(2, 17), st.integers(0, 5), st.integers(1, 5))
def test_every_image_once_in_batches_of_at_least_two(
    num_samples: int, batch_size: int, seed: int, epoch: int
) -> None:
    sampler = EpochBatches(num_samples, batch_size, seed=seed)
    sampler.epoch = epoch
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(num_samples))
    assert all(2 <= len(batch) <= batch_size + 1 for batch in batches)
    assert len(sampler) == len(batches)
    assert list(sampler) == batches
    sampler.start = 1
    assert list(sampler) == batches[1:]
    sampler.start, sampler.epoch = 0, epoch + 1
    assert num_samples < 50 or list(sampler) != batches


class KillingDataset(SegmentationDataset):
    """Kills its process when it reads one image."""

    index = 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == self.index:
            self.fail()
        return super().__getitem__(index)

    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FailingDataset(KillingDataset):
    def fail(self) -> None:
        raise DataError("image.png: is broken.")


def allow_open_files(count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@contextmanager
def limited_open_files(count: int) -> Iterator[None]:
    """Allow this process to open `count` more files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while descriptors[-1] < 99:
            descriptors.append(os.dup(descriptors[0]))
        allow_open_files(100 + count)
        yield
    finally:
        allow_open_files(soft)
        for descriptor in descriptors:
            os.close(descriptor)


def make_loader(
    scenes: Path, kind: type[SegmentationDataset], *, workers: int = 1, accumulate: int = 1
) -> TrainingLoader:
    splits = find_training_splits(small_config(scenes))
    dataset = kind(splits.train, ClassMap.from_file(scenes / "classes.json"))
    batches = EpochBatches(len(dataset), 2, seed=0)
    return TrainingLoader(
        dataset, batches, accumulate=accumulate, workers=workers, pin_memory=False
    )


def load_all(loader: TrainingLoader, start: int = 0) -> list[Any]:
    with loader.manage_workers():
        return list(loader.batches(1, start=start))


def test_groups_of_batches(scenes: Path) -> None:
    loader = make_loader(scenes, SegmentationDataset, workers=0, accumulate=3)
    expected = list(loader.batches(1))
    for start, sizes, lengths in ((0, [3, 1], [3, 1]), (2, [3, 1], [1, 1]), (3, [1], [1])):
        groups = [(group.size, list(group.batches)) for group in loader.groups(1, start=start)]
        assert [size for size, _ in groups] == sizes
        assert [len(batches) for _, batches in groups] == lengths
        assert_equal([batch for _, batches in groups for batch in batches], expected[start:])
    assert list(loader.groups(1, start=4)) == []


def test_a_worker_that_dies_names_its_file(scenes: Path) -> None:
    sample = find_training_splits(small_config(scenes)).train[KillingDataset.index]
    text = rf"died: .*It was reading .*{sample.image.name} with .*{sample.mask.name}\. If it was"
    with pytest.raises(TrainingError, match=text):
        load_all(make_loader(scenes, KillingDataset))


def test_an_error_in_a_worker_keeps_its_message(scenes: Path) -> None:
    with pytest.raises(DataError, match=r"^image\.png: is broken\.$"):
        load_all(make_loader(scenes, FailingDataset))


def test_skipped_batches_are_not_loaded(scenes: Path) -> None:
    order = list(EpochBatches(8, 2, seed=0))
    start = next(i for i, batch in enumerate(order) if FailingDataset.index in batch) + 1
    assert len(load_all(make_loader(scenes, FailingDataset), start)) == len(order) - start


OUT_OF_FILES = "Too many open files to start or run the data loading workers. Lower --workers"


@pytest.mark.parametrize("is_collated", [False, True])
def test_a_batch_that_cannot_be_sent_ends_the_run(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, is_collated: bool
) -> None:
    """The worker cannot open files when it collates the batch, or only when it sends it."""
    collate = loading._collate

    def starve(items: list[Any]) -> Any:
        if not is_collated:
            allow_open_files(3)
        batch = collate(items)
        allow_open_files(3)
        return batch

    monkeypatch.setattr(loading, "_collate", starve)
    monkeypatch.setattr(KillingDataset, "index", -1)
    with pytest.raises(TrainingError, match=OUT_OF_FILES):
        load_all(make_loader(scenes, KillingDataset))


@pytest.mark.parametrize("left", [0, 5, 9])
def test_too_few_open_files_are_reported_before_workers_start(scenes: Path, left: int) -> None:
    loader = make_loader(scenes, FailingDataset)
    with limited_open_files(left), pytest.raises(TrainingError, match=OUT_OF_FILES):
        load_all(loader)
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's __del__
def test_workers_of_an_incomplete_start_are_ended(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers ignore SIGTERM if a command handles it; Python would wait for them."""
    handler = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    started: list[Any] = []
    start = multiprocessing.process.BaseProcess.start

    def start_one(process: multiprocessing.process.BaseProcess) -> None:
        if started:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        start(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start_one)
    with pytest.raises(TrainingError, match=OUT_OF_FILES):
        load_all(make_loader(scenes, FailingDataset, workers=2))
    signal.signal(signal.SIGTERM, handler)
    assert started
    assert not started[0].is_alive()


@pytest.mark.parametrize(("num_samples", "size", "least"), [(22, 2, 2), (21, 4, 2), (18, 4, 1)])
def test_processes_share_the_batches_of_one(num_samples: int, size: int, least: int) -> None:
    whole = EpochBatches(num_samples, 8, seed=3)
    shared = [
        EpochBatches(num_samples, 8, seed=3, world=World(Process(rank, size)), least=least)
        for rank in range(size)
    ]
    for batches in (whole, *shared):
        batches.epoch, batches.start = 2, 1
    parts = zip(*shared, strict=True)
    for number, (batch, of_ranks) in enumerate(zip(whole, parts, strict=True), 1):
        own = [p for b, p in zip(shared, of_ranks, strict=True) if not b.is_repeated(number)]
        assert [index for part in own for index in part] == batch
        assert min(map(len, own)) >= least
        assert all(least <= len(part) for part in of_ranks)
        assert shared[0].size_of(number) == len(batch)
    assert [len(batches) for batches in shared] == [len(whole)] * size
    assert not any(batches.is_repeated(0) for batches in shared)
