"""Loading of training batches in worker processes; the entry point is `TrainingLoader`."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.data.dataset import SegmentationDataset
from dcnseg.engine.distributed import SINGLE, World
from dcnseg.errors import DcnsegError, TrainingError

PR_SET_PDEATHSIG = 1  # prctl option on Linux
JOIN_SECONDS = 5.0  # how long to wait for a worker to exit
# Open files: pipes per worker, and the files of torch's queues and of the check itself.
FILES_PER_WORKER, EXTRA_FILES = 4, 10
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
_OUT_OF_FILES = (
    "Too many open files to start or run the data loading workers. Lower --workers (0 starts "
    "none), or raise the limit with `ulimit -n`."
)

Batch = tuple[Tensor, Tensor]  # float32 [B, 3, h, w], int64 [B, h, w]


@dataclass(frozen=True)
class BatchGroup:
    """The batches of one optimizer step, loaded as they are iterated over."""

    size: int
    batches: Iterable[Batch]


class EpochBatches(Sampler[list[int]]):
    """The batches of epoch `epoch` as lists of indices, without the first `start`.

    The order depends on the seed and the epoch only. A last batch of one image is merged into the
    one before it, because batch normalization needs two. Several processes share each batch: the
    first has its first images, and so on. If a last batch has too few images, processes that get
    none repeat its first ones, without labels.

    Args:
        num_samples: Number of images, at least 2.
        batch_size: Images per batch of all processes, at least 2.
        seed: The run's seed.
        world: The processes.
        least: Images that each process needs.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        world: World = SINGLE,
        least: int = 2,
    ) -> None:
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self._world = world
        self._least = least
        self.epoch = 1
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's part of the remaining batches of the current epoch."""
        rank = self._world.rank
        for number, batch in enumerate(self.whole_batches(), self.start):
            if self.is_repeated(number):
                yield batch[: self._least]
            else:
                sharing = self._sharing(number)
                first, end = (len(batch) * index // sharing for index in (rank, rank + 1))
                yield batch[first:end]

    def is_repeated(self, number: int) -> bool:
        """Whether this process only repeats images of a batch, which is counted from 0."""
        return self._world.rank >= self._sharing(number)

    def _sharing(self, number: int) -> int:
        """The number of processes that share a batch."""
        return min(self._world.size, max(1, self.size_of(number) // self._least))

    def size_of(self, number: int) -> int:
        """Return the number of images of a batch, which is counted from 0."""
        first = number * self._batch_size
        end = first + self._batch_size if number + 1 < len(self) else self._num_samples
        return end - first

    def whole_batches(self) -> Iterator[list[int]]:
        """Yield the remaining batches of the current epoch, with the images of all processes."""
        generator = np.random.default_rng((self._seed, self.epoch))
        order = generator.permutation(self._num_samples).tolist()
        bounds = [i * self._batch_size for i in range(len(self))] + [self._num_samples]
        for i in range(self.start, len(self)):
            yield order[bounds[i] : bounds[i + 1]]

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, which is the same for all epochs."""
        batches, rest = divmod(self._num_samples, self._batch_size)
        return batches + (1 if rest > 1 or not batches else 0)


class TrainingLoader:
    """Loads the batches of each epoch, in groups of `accumulate`, starting at any batch.

    With `workers=0` the main process reads the images.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        batches: EpochBatches,
        *,
        accumulate: int = 1,
        workers: int,
        pin_memory: bool,
    ) -> None:
        workers = min(workers, len(batches))
        self._dataset = dataset
        self._batches = batches
        self._accumulate = accumulate
        self._tracked = _TrackedDataset(dataset, workers)
        self._loader: DataLoader[Any] = DataLoader(
            self._tracked,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate,
            worker_init_fn=self._tracked.start_worker,
            generator=torch.Generator(),  # so that worker seeds do not consume global randomness
        )
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    def groups(self, epoch: int, *, start: int = 0) -> Iterator[BatchGroup]:
        """Yield the batches of each optimizer step of an epoch, without the first `start` batches.

        The last group of an epoch may be smaller. Each group must be consumed before the next.

        Raises:
            DataError: an image or mask is invalid; the message names the file.
        """
        batches = self.batches(epoch, start=start)
        while start < len(self._batches):
            first = start - start % self._accumulate
            size = min(self._accumulate, len(self._batches) - first)
            yield BatchGroup(size, islice(batches, first + size - start))
            start = first + size

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, as `groups` does, without the first `start`."""
        self._dataset.set_epoch(epoch)
        self._batches.epoch, self._batches.start = epoch, start
        for number, batch in enumerate(self._start_epoch(), start):
            if isinstance(batch, DcnsegError):
                raise batch
            images, labels = batch
            if self._batches.is_repeated(number):
                labels.fill_(IGNORE_INDEX)  # another process learns from them
            yield images, labels

    def _start_epoch(self) -> Iterator[Any]:
        """Start iterating; register new worker processes even if some of them fail to start."""
        if not self._processes:
            _check_open_files(self._loader.num_workers)
        others = set(multiprocessing.active_children())
        try:
            return iter(self._loader)
        finally:
            self._processes |= set(multiprocessing.active_children()) - others

    @contextmanager
    def manage_workers(self) -> Iterator[None]:
        """Stop the workers on exit, and explain the death of a worker by the files it was reading.

        Wrap the whole training loop: torch raises the error anywhere in the main process.

        Raises:
            TrainingError: a worker died, or too many files are open.
        """
        try:
            try:
                yield
            finally:
                self._close()
        except (OSError, RuntimeError) as error:
            is_death = str(error).startswith("DataLoader worker")
            if _is_out_of_files(error) or (is_death and self._tracked.is_out_of_files()):
                raise TrainingError(_OUT_OF_FILES) from error
            if not is_death:
                raise
            raise TrainingError(self._describe_death(str(error))) from error

    def _close(self) -> None:
        """Stop the workers, including those that hang and those of an incomplete start."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        for process in self._processes:
            process.join(JOIN_SECONDS if iterator is not None else 0)
            process.kill()  # workers ignore SIGTERM, which Python would send and wait for
            process.join(JOIN_SECONDS)
        self._processes.clear()

    def _describe_death(self, reason: str) -> str:
        found = re.search(r"pid(?:\(s\))? ([\d, ]+)", reason)
        pids = {int(pid) for pid in found[1].split(",")} if found else set()
        samples = [self._dataset.samples[index] for index in self._tracked.being_read(pids)]
        files = ", ".join(f"{sample.image} with {sample.mask}" for sample in samples)
        cause = reason.partition("\n")[0].removeprefix("DataLoader worker ")
        return (
            f"A data loading worker died: {cause.rstrip('.')}. It was reading "
            f"{files or 'no file'}. If it was killed, the machine probably ran out of memory: "
            "lower --workers, --batch-size or --crop-size. Otherwise, check the file; with "
            "--workers 0, the main process reads it."
        )


class _TrackedDataset(Dataset[Any]):
    """Records in shared memory which image each worker is reading."""

    def __init__(self, dataset: SegmentationDataset, workers: int) -> None:
        self._dataset = dataset
        # Columns: process id, index of the image, whether the worker ran out of files.
        self._status = torch.full((max(1, workers), 3), -1, dtype=torch.int64)
        self._status.share_memory_()

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self._dataset[index]
        status = self._status[worker.id]
        status[0], status[1] = os.getpid(), index
        try:
            return self._dataset[index]
        except DcnsegError as error:
            return error  # raised in the main process; torch would wrap it in a traceback
        finally:
            status[1] = -1  # not reached by a process that dies

    def __len__(self) -> int:
        return len(self._dataset)

    def start_worker(self, worker: int) -> None:
        """Set up a worker process.

        Only the main process handles signals sent to the process group, and the worker ends with
        it. A batch that cannot be sent ends the worker: torch would wait for the batch forever.
        """
        for number in _IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

        def exit_worker(error: Exception, _batch: Any) -> None:
            if _is_out_of_files(error):
                self._status[worker, 2] = 1
            os._exit(1)

        # Called by the thread that sends the queue's items when sending fails.
        feeder = staticmethod(exit_worker)
        multiprocessing.queues.Queue._on_queue_feeder_error = feeder  # type: ignore[attr-defined]

    def is_out_of_files(self) -> bool:
        """Whether a worker exited because it could not open more files."""
        return bool((self._status[:, 2] == 1).any())

    def being_read(self, pids: set[int]) -> list[int]:
        """Return the indices that these processes, or all if `pids` is empty, were reading."""
        status = [(int(pid), int(index)) for pid, index, _ in self._status]
        return [index for pid, index in status if index >= 0 and (not pids or pid in pids)]


def _collate(items: Sequence[Any]) -> Any:
    error = next((item for item in items if isinstance(item, DcnsegError)), None)
    return default_collate(list(items)) if error is None else error


def _check_open_files(workers: int) -> None:
    """Raise an OSError if the files that the workers need, plus a few, cannot be opened."""
    descriptors: list[int] = []
    try:
        for _ in range(FILES_PER_WORKER * workers + EXTRA_FILES if workers else 0):
            descriptors.append(os.open(os.devnull, os.O_RDONLY))  # noqa: PERF401  (may fail)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _is_out_of_files(error: Exception) -> bool:
    """Whether an error, possibly reported by a worker, means that too many files are open."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in str(error)
