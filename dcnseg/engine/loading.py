"""Batches of training images, loaded by processes that end with this one.

The entry point is `TrainingLoader`.
"""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from dcnseg.data.dataset import SegmentationDataset
from dcnseg.engine.batches import EpochBatches
from dcnseg.errors import DcnsegError, TrainingError

PR_SET_PDEATHSIG = 1  # of Linux's prctl
JOIN_SECONDS = 5.0  # for a worker that is to end
FILES_PER_WORKER, FILES_BESIDE = 4, 10  # pipes of a worker; torch's queues and its own check
_LEFT_TO_MAIN_PROCESS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
_OUT_OF_FILES = (
    "Too many files are open for the processes that load images. Use fewer --workers (0 needs "
    "none), or raise the limit with `ulimit -n`."
)

Batch = tuple[Tensor, Tensor]  # float32 [B, 3, h, w], int64 [B, h, w]


class TrainingLoader:
    """The batches of each epoch, from any step on.

    Args:
        dataset: The training images.
        batches: Which of them form which batch.
        workers: Loading processes; 0 loads in this one.
        pin_memory: Whether batches go to a GPU.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        batches: EpochBatches,
        *,
        workers: int,
        pin_memory: bool,
    ) -> None:
        workers = min(workers, len(batches))
        self._dataset = dataset
        self._batches = batches
        self._noted = _TrackedDataset(dataset, workers)
        self._loader: DataLoader[Any] = DataLoader(
            self._noted,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            collate_fn=_collate,
            worker_init_fn=self._noted.start_worker,
            generator=torch.Generator(),  # its own, so that the workers' seeds cost dropout none
        )
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch without the first `start`, which are not loaded.

        Raises:
            DataError: an image or mask is wrong; the message names it.
        """
        self._dataset.set_epoch(epoch)
        self._batches.epoch, self._batches.start = epoch, start
        for batch in self._start():
            if isinstance(batch, DcnsegError):
                raise batch
            images, labels = batch
            yield images, labels

    def _start(self) -> Iterator[Any]:
        """Begin an epoch; note the processes that are started, also if not all of them can be."""
        if not self._processes:
            _require_open_files(self._loader.num_workers)
        others = set(multiprocessing.active_children())
        try:
            return iter(self._loader)
        finally:
            self._processes |= set(multiprocessing.active_children()) - others

    @contextmanager
    def explain_worker_death(self) -> Iterator[None]:
        """Within it, a worker's death is an error that names the files it was reading.

        torch raises it wherever this process happens to be, hence around the whole loop.

        Raises:
            TrainingError: a worker has died, or too many files are open.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            is_death = str(error).startswith("DataLoader worker")
            if _is_out_of_files(error) or (is_death and self._noted.is_out_of_files()):
                raise TrainingError(_OUT_OF_FILES) from error
            if not is_death:
                raise
            raise TrainingError(self._describe_death(str(error))) from error

    def close(self) -> None:
        """End the workers: those that hang as well, and those of a start that failed halfway."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        for process in self._processes:
            process.join(JOIN_SECONDS if iterator is not None else 0)
            process.kill()  # they ignore SIGTERM, with which Python would end them and wait
            process.join(JOIN_SECONDS)
        self._processes.clear()

    def _describe_death(self, reason: str) -> str:
        found = re.search(r"pid(?:\(s\))? ([\d, ]+)", reason)
        pids = {int(pid) for pid in found[1].split(",")} if found else set()
        indices = self._noted.being_read(pids)
        samples = [self._dataset.samples[index] for index in indices]
        files = ", ".join(f"{sample.image} with {sample.mask}" for sample in samples)
        how = reason.partition("\n")[0].removeprefix("DataLoader worker ")
        return (
            f"A process that loads images died: {how.rstrip('.')}. "
            + (f"It was reading {files}. " if files else "It was reading no file. ")
            + "Killed usually means that memory ran out: use fewer --workers, a smaller "
            "--batch-size or --crop-size. Otherwise look at the file; --workers 0 reads it in the "
            "main process."
        )


class _TrackedDataset(Dataset[Any]):
    """Notes in shared memory which image each worker is reading."""

    def __init__(self, dataset: SegmentationDataset, workers: int) -> None:
        self._dataset = dataset
        # Process, index, and whether it could open no more files.
        self._notes = torch.full((max(1, workers), 3), -1, dtype=torch.int64)
        self._notes.share_memory_()

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self._dataset[index]
        note = self._notes[worker.id]
        note[0], note[1] = os.getpid(), index
        try:
            return self._dataset[index]
        except DcnsegError as error:
            return error  # raised in the main process; torch would wrap it in a traceback
        finally:
            note[1] = -1  # not reached by a process that dies

    def __len__(self) -> int:
        return len(self._dataset)

    def start_worker(self, worker: int) -> None:
        """Prepare a loading process.

        Signals that are sent to the whole group are left to the main process, and the worker ends
        with it. A batch that cannot be handed over ends it: torch would wait for it forever.
        """
        for number in _LEFT_TO_MAIN_PROCESS:
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

        def end(error: Exception, _batch: Any) -> None:
            if _is_out_of_files(error):
                self._notes[worker, 2] = 1
            os._exit(1)

        # The thread that sends what is in a queue calls this where sending fails.
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]

    def is_out_of_files(self) -> bool:
        """Whether a worker has ended since it could open no more files."""
        return bool((self._notes[:, 2] == 1).any())

    def being_read(self, pids: set[int]) -> list[int]:
        """What these processes were reading; all processes if there are none."""
        notes = [(int(pid), int(index)) for pid, index, _ in self._notes]
        return [index for pid, index in notes if index >= 0 and (not pids or pid in pids)]


def _collate(items: Sequence[Any]) -> Any:
    wrong = next((item for item in items if isinstance(item, DcnsegError)), None)
    return default_collate(list(items)) if wrong is None else wrong


def _require_open_files(workers: int) -> None:
    """Raise an OSError if a few files more than the workers need cannot be opened."""
    descriptors: list[int] = []
    try:
        for _ in range(FILES_PER_WORKER * workers + FILES_BESIDE if workers else 0):
            descriptors.append(os.open(os.devnull, os.O_RDONLY))  # noqa: PERF401  (may fail)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _is_out_of_files(error: Exception) -> bool:
    """Whether the process, or a worker whose error this is, has as many files open as it may."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in str(error)
