"""The processes that share a run, as `torchrun` describes them in environment variables.

Imports no torch. Entry point: `this_process`.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Final

from dcnseg.errors import ConfigError, short_repr

_DEFAULT_JOB: Final = "none"  # the job id of torchrun without --standalone and --rdzv-id


@dataclass(frozen=True)
class Process:
    """A process, and its place among those that share a run.

    Attributes:
        rank: Its number, 0 to size - 1.
        size: Number of processes on all machines.
        local_rank: Its number on its machine.
        local_size: Number of processes on its machine.
        restarts: How often torchrun has restarted the processes.
        job: What identifies the job of torchrun; empty without torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    job: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def describe(self) -> str:
        """Describe the process for messages."""
        return f"rank {self.rank}, process {os.getpid()} on {socket.gethostname()}"


def this_process() -> Process:
    """Read the environment variables of torchrun.

    Raises:
        ConfigError: a variable is not an integer, or variables are missing.
    """
    restarts, job = _read("TORCHELASTIC_RESTART_COUNT", 0), _job()
    size = _read("WORLD_SIZE", 1)
    if size == 1 or "RANK" not in os.environ:  # some schedulers set only WORLD_SIZE
        return Process(restarts=restarts, job=job)
    rank = _read("RANK", 0)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or not 0 <= rank < size:
        found = f"{missing[0]} is not set" if missing else f"RANK is {rank}"
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {found}. Start several processes with torchrun, which sets "
            "these variables."
        )
    local_rank, local_size = _read("LOCAL_RANK", rank), _read("LOCAL_WORLD_SIZE", size)
    return Process(rank, size, local_rank, local_size, restarts, job)


def _read(name: str, default: int) -> int:
    text = os.environ.get(name, "") or str(default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"The environment variable {name} is {short_repr(text)}; expected an integer. torchrun "
            "sets it; unset it to use one process."
        ) from None


def _job() -> str:
    """Identify the job of torchrun, whose id is optional, also after it restarted the processes."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()}:{os.getppid()}" if job == _DEFAULT_JOB else job
