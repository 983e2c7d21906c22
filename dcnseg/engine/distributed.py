"""Several processes that share a run: what they exchange; entry point `join_world`.

Every function of `World` that exchanges something must be called by all processes, in the same
order. With one process they do nothing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dcnseg.device import select_device
from dcnseg.engine.lost_processes import watch_processes
from dcnseg.errors import ConfigError, DcnsegError, OtherProcessError
from dcnseg.models.segmenter import Segmenter
from dcnseg.processes import Process, this_process

TIMEOUT: Final = timedelta(hours=1)  # for the others while one process reads or writes files
PROBE_SIDE: Final = 64  # pixels of an image that shows which parameters are used

Item = TypeVar("Item")
Result = TypeVar("Result")

_joined = count()


@dataclass(frozen=True)
class World:
    """The processes that share a run, and the place of this one among them."""

    process: Process = field(default_factory=Process)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.process.rank

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.process.size

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.process.is_main

    def claim_device(self, name: str) -> None:
        """With CUDA, make the GPU with the local rank of this process its "cuda" device.

        Args:
            name: Value of `--device`.

        Raises:
            ConfigError: several processes cannot use this device.
        """
        if self.size == 1:
            return
        device = select_device(name)
        if device.type == "mps":
            raise ConfigError(
                f"--device is {name}, which selects mps; several processes can use CUDA GPUs or "
                "the CPU. Pass --device cpu, or start one process."
            )
        if device.type == "cuda":
            if device.index is not None:
                raise ConfigError(
                    f"--device is {name}; each of several processes uses a GPU of its own. Pass "
                    "--device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES."
                )
            if self.process.local_size > torch.cuda.device_count():
                raise ConfigError(
                    f"There are {self.process.local_size} processes on this machine, but PyTorch "
                    f"finds {torch.cuda.device_count()} GPUs. Lower --nproc-per-node of torchrun."
                )
            torch.cuda.set_device(self.process.local_rank)

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor without gradient over the processes; all get the same result."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))  # on the CPU: no synchronization with a GPU
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def gather(self, value: Item) -> list[Item]:
        """Return the values of all processes, by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call a function in the main process only, and return its result in every process.

        Raises:
            OtherProcessError: the function failed; the main process raises the error itself.
        """
        if self.size == 1:
            return function()
        message: list[Any] = [False, None]
        try:
            if self.is_main:
                message = [True, function()]
        finally:  # the others wait for it, also after an error
            dist.broadcast_object_list(message)
        is_done, result = message
        if not is_done:
            raise OtherProcessError("The main process failed; see its message.")
        return result  # type: ignore[no-any-return]

    def explain(self, error: DcnsegError) -> DcnsegError:
        """Return an error that all processes raise: only the main one reports its text."""
        return error if self.is_main else OtherProcessError(str(error))

    def part_of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every size-th item, starting with the rank; the first process never has fewer."""
        return items[self.rank :: self.size]

    def synchronize_batch_norm(self, model: Segmenter) -> Segmenter:
        """On GPUs, let batch normalization use the statistics of all processes' images."""
        if self.size == 1 or not _is_on_gpu(model):
            return model
        # timm's function also keeps the activation of timm's batch normalization.
        converted = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        assert isinstance(converted, Segmenter)
        return converted

    def average_buffers(self, model: nn.Module) -> None:
        """Average the running statistics of batch normalization that is not synchronized."""
        if self.size == 1:
            return
        buffers = [
            buffer
            for module in model.modules()
            if not isinstance(module, nn.SyncBatchNorm)
            for buffer in module.buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        if not buffers:
            return
        mean = self.mean(torch.cat([buffer.flatten() for buffer in buffers]))
        parts = mean.split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def parallelize(self, model: Segmenter) -> Segmenter | DistributedDataParallel:
        """Wrap a network so that a backward pass averages the gradients over the processes."""
        if self.size == 1:
            return model
        # The buffers are the same after each step; see `average_buffers`.
        known = inspect.signature(DistributedDataParallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {option: False}
        return DistributedDataParallel(
            model, find_unused_parameters=_has_unused_parameters(model), **options
        )


SINGLE: Final = World()


@contextmanager
def join_world() -> Iterator[World]:
    """Connect with the other processes of torchrun; without torchrun, yield one process.

    Raises:
        TrainingError: another process was lost; the message names it.
        OtherProcessError: the main process reports the reason.
    """
    process = this_process()
    if process.size == 1:
        yield World(process)
        return
    has_gpu = torch.cuda.is_available()
    prefix = f"dcnseg/{process.restarts}/{next(_joined)}"
    store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
    with (
        warnings.catch_warnings(),
        watch_processes(process, PrefixStore(f"{prefix}/watch", store.clone())),
    ):
        # In channels-last, torch compares strides of dimensions of size 1, which mean nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            store=PrefixStore(prefix, store),
            rank=process.rank,
            world_size=process.size,
            timeout=TIMEOUT,
        )
        try:
            yield World(process)
        except Exception:
            if not has_gpu:  # NCCL would wait for the others
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def least_images(device: torch.device) -> int:
    """Images that each of several processes needs for batch normalization."""
    return 1 if device.type == "cuda" else 2  # synchronized on GPUs


def require_shareable_batch(batch_size: int, num_processes: int, least: int) -> None:
    """Raise a ConfigError unless a batch can be divided among processes, `least` images each."""
    share, rest = divmod(batch_size, num_processes)
    if num_processes > 1 and rest:
        raise ConfigError(
            f"--batch-size is {batch_size}, which {num_processes} processes cannot share equally; "
            f"expected a multiple of {num_processes}."
        )
    if num_processes > 1 and share < least:
        raise ConfigError(
            f"--batch-size is {batch_size} for {num_processes} processes; batch normalization "
            f"needs at least {least} images in each. Use at least {least * num_processes}, or at "
            f"most {batch_size // least} processes."
        )


def _is_on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cuda"


def _has_unused_parameters(model: Segmenter) -> bool:
    """Whether the logits do not depend on some parameters, such as an encoder's unused stages."""
    names, parameters = zip(*_learned(model), strict=True)
    is_training = model.training
    image = torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, device=parameters[0].device)
    gradients = torch.autograd.grad(model.eval()(image).sum(), parameters, allow_unused=True)
    model.train(is_training)
    pairs = zip(names, gradients, strict=True)
    return any(grad is None for name, grad in pairs if not name.startswith("region_head."))


def _learned(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
