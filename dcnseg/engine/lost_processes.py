"""Finds out which process of a run was lost; entry point `watch_processes`.

A lost process is seen as a failed exchange with any other process, whose error gives a network
address at best. So each process counts up a value in the store that all of them share: the process
whose value stands still is the one that was lost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from dcnseg.errors import DcnsegError, OtherProcessError, TrainingError
from dcnseg.processes import Process

BEAT_SECONDS: Final = 0.5
SILENCE_SECONDS: Final = 5.0  # without a beat, for a process to be lost
_NETWORK_ERRORS: Final = ("gloo", "nccl", "connection", "timed out", "socket")


@contextmanager
def watch_processes(process: Process, store: Store) -> Iterator[None]:
    """Replace errors of an exchange with other processes by an error that names the lost ones.

    Args:
        process: This process.
        store: A connection that nothing else uses.

    Raises:
        TrainingError: a process was lost. Only the main process raises it, or all if that is lost.
        OtherProcessError: the same in the other processes.
    """
    store.set(f"name/{process.rank}", process.describe())
    is_over = threading.Event()
    thread = threading.Thread(target=_beat, args=(process, store, is_over), daemon=True)
    thread.start()
    try:
        yield
    except DcnsegError:
        raise
    except Exception as error:
        if not _is_of_network(error):
            raise
        raise _explain(process, store, error) from error
    finally:
        is_over.set()
        thread.join()


def _beat(process: Process, store: Store, is_over: threading.Event) -> None:
    try:
        while not is_over.wait(BEAT_SECONDS):
            store.add(f"beat/{process.rank}", 1)
    except RuntimeError:  # the machine of the store was lost
        return


def _is_of_network(error: Exception) -> bool:
    text = str(error).lower()
    is_known = isinstance(error, RuntimeError) and any(word in text for word in _NETWORK_ERRORS)
    return is_known or isinstance(error, dist.DistError)


def _explain(process: Process, store: Store, error: Exception) -> DcnsegError:
    reason = str(error).partition("\n")[0].partition(". ")[0]
    try:
        lost = _find_silent(process, store)
        names = [store.get(f"name/{rank}").decode() for rank in lost]
    except RuntimeError:
        lost, names = [0], ["rank 0, or the machine it runs on"]
    if not lost:
        text = f"The exchange with the other processes failed: {reason}."
    else:
        text = f"Lost {'; '.join(names)}: it has ended or does not answer."
    if process.is_main or 0 in lost:
        return TrainingError(f"{text} A run can be resumed with --resume.")
    return OtherProcessError(text)


def _find_silent(process: Process, store: Store) -> list[int]:
    """The other processes that do not beat, and have not just found this out themselves."""
    store.add(f"noticed/{process.rank}", 1)
    others = [rank for rank in range(process.size) if rank != process.rank]
    before = [store.add(f"beat/{rank}", 0) for rank in others]
    time.sleep(SILENCE_SECONDS)
    now = [store.add(f"beat/{rank}", 0) for rank in others]
    silent = [rank for rank, old, new in zip(others, before, now, strict=True) if old == new]
    return [rank for rank in silent if not store.add(f"noticed/{rank}", 0)]
