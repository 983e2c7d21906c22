"""Prediction of many images on a Ray cluster, with Ray Data; entry point `predict_with_ray`."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Final, TextIO, cast

import torch

from dcnseg.checkpoint import find_weights
from dcnseg.config import OVERLAY_OPACITY
from dcnseg.data.raster_file import check_bands
from dcnseg.errors import ConfigError, DcnsegError
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.output_plan import OutputTask, plan_outputs
from dcnseg.inference.parts import Part
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.ray_worker import Journal, Worker, WorkerSettings
from dcnseg.inference.remote_files import AnyPath
from dcnseg.inference.results import FileResult

CHUNK: Final = 16  # images that a worker gets at a time; it reads and writes ahead within them
CPUS_PER_WORKER: Final = 4  # by default, without GPUs


@dataclass(frozen=True)
class Share:
    """The number of workers, and the CPUs and GPUs of each."""

    num_workers: int
    num_cpus: int
    num_gpus: int


def predict_with_ray(
    predictor: Predictor,
    run: Path | str,
    images: Sequence[InputImage],
    out: AnyPath,
    kinds: Sequence[str],
    *,
    device: str = "auto",
    amp: str = "off",
    num_workers: int = 0,
    opacity: float = OVERLAY_OPACITY,
    skip_existing: bool = False,
    refuse_existing: bool = False,
    part: Part | None = None,
    bands: Sequence[int] = (),
    on_result: Callable[[FileResult], None] | None = None,
) -> list[FileResult]:
    """Predict images in the workers of a Ray cluster; outputs and results as `predict_files`.

    Connects to the cluster that the variable RAY_ADDRESS names, or starts one on this machine for
    the time of the call. Each worker is an actor with the network in memory. A worker that is
    killed is replaced; images that it has finished are not predicted again. Results come in the
    order of `images`, as soon as those before them are done.

    Args:
        predictor: The network, for its settings and classes; workers load their own.
        run: Its run folder or weights file. Workers get the content, so they need no access to it.
        images: As for `predict_files`, on a disk that all workers share, or at URLs.
        out: The output folder, also shared, or a URL.
        kinds: As for `predict_files`, and so are the other arguments.
        device: "auto", "cpu" or "cuda". With "auto", each worker has a GPU if the cluster has any.
        amp: As for `Predictor.from_checkpoint`.
        num_workers: 0: one for each GPU, or for each 4 CPUs if there is no GPU.
        opacity: As for `predict_files`.
        skip_existing: As for `predict_files`.
        refuse_existing: As for `predict_files`.
        part: As for `predict_files`.
        bands: As for `predict_files`.
        on_result: As for `predict_files`.

    Raises:
        ConfigError: Ray is not installed, no cluster answers at RAY_ADDRESS, the device cannot be
            used, or as for `predict_files`.
        DataError: As for `predict_files`.
        DcnsegError: Ray failed; outputs written so far are complete.
        OSError: Outputs cannot be written, for example because the disk is full.
    """
    _check_device(device)
    import_ray()
    check_bands(bands)
    if "regions" in kinds:
        predictor.region_head()  # fail early
    plan = plan_outputs(
        images, out, kinds, skip_existing=skip_existing, refuse_existing=refuse_existing, part=part
    )
    results: list[FileResult] = []
    settings = WorkerSettings(
        weights_name=find_weights(Path(run)).name,
        device=device,
        amp=amp,
        config=predictor.config,
        opacity=opacity,
        bands=tuple(bands),
        folders=[_absolute(folder) for folder in plan.folders],
        num_threads=0,  # known with the cluster
        num_workers=num_workers,
    )
    weights = find_weights(Path(run)).read_bytes()
    for result in chain(plan.skipped_results(), _predict(plan.tasks, weights, settings)):
        results.append(result)
        if on_result:
            on_result(result)
    plan.merge_regions(results, predictor.class_map)
    return results


def import_ray() -> Any:
    """Import Ray with Ray Data.

    Raises:
        ConfigError: One of them is not installed.
    """
    # By default, Ray reports how it is used to its makers, and warns about Ray Data's own actors.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise ConfigError(
            f"--engine ray needs Ray Data, which cannot be imported ({error}). Install it with "
            "`pip install 'dcnseg[ray]'`."
        ) from error
    return ray


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device is {device!r}; with --engine ray, expected auto, cpu or cuda. Ray gives "
            "each worker a GPU of its own."
        )


def _predict(
    tasks: Sequence[OutputTask], weights: bytes, settings: WorkerSettings
) -> Iterator[FileResult]:
    """Yield the results in the order of the tasks."""
    if not tasks:
        return
    ray = import_ray()
    # Ray prints messages about killed workers on stdout, in a thread of its own.
    with redirect_stdout(cast("TextIO", OwnThreadStream(sys.stdout))), connected(ray):
        try:
            yield from _in_order(_predict_on_cluster(ray, tasks, weights, settings))
        except ray.exceptions.RayError as error:
            raise DcnsegError(
                f"Ray failed ({_first_line(error)}). Outputs written so far are complete; add "
                "--skip-existing to continue."
            ) from error


class OwnThreadStream:
    """A stream for the thread that creates it; what other threads write goes to stderr."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._owner = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        is_owner = threading.get_ident() == self._owner
        return getattr(self._stream if is_owner else sys.stderr, name)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def connected(ray: Any) -> Iterator[None]:
    """Connect to a cluster, or start one, unless this process is connected already.

    Ray's messages are limited to errors, and go to stderr.

    Raises:
        ConfigError: No cluster answers at RAY_ADDRESS.
        DcnsegError: Ray cannot be started on this machine.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # Without "local", Ray would connect to any cluster that was started on this machine before.
    options: dict[str, Any] = {} if address else {"address": "local", "include_dashboard": False}
    try:
        with redirect_stdout(sys.stderr), _kept_signal_handlers():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}, and no Ray cluster answers there ({_first_line(error)}). "
            "Correct it, or unset it to start Ray on this machine."
        ) from error
    except Exception as error:  # Ray raises plain exceptions
        raise DcnsegError(f"Ray cannot be started ({_first_line(error)}).") from error
    try:
        yield
    finally:
        with redirect_stdout(sys.stderr):  # prints messages that it has not printed yet
            ray.shutdown()


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Restore the handlers of signals, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _predict_on_cluster(
    ray: Any, tasks: Sequence[OutputTask], weights: bytes, settings: WorkerSettings
) -> Iterator[tuple[int, list[FileResult]]]:
    """Yield the numbers of chunks of tasks, from 0, with their results, as they are done."""
    share = divide_cluster(
        [node["Resources"] for node in ray.nodes() if node["Alive"]],
        settings.num_workers,
        uses_gpus=settings.device != "cpu",
    )
    chunks = _split(tasks, share.num_workers)
    num_workers = min(share.num_workers, len(chunks))
    # The number of threads of PyTorch can change the last bits of sums. OMP_NUM_THREADS sets it
    # for this engine and for the local one.
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else share.num_cpus
    settings = replace(settings, num_threads=threads, num_workers=num_workers)
    journal = start_journal(ray)
    try:
        rows = [
            {
                "number": number,
                "tasks": pickle.dumps([_with_absolute_paths(task) for task in chunk]),
            }
            for number, chunk in enumerate(chunks)
        ]
        with _quiet_context(ray.data.DataContext.get_current()):
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                Worker,
                fn_constructor_args=(ray.put(weights), journal, settings),
                compute=ray.data.ActorPoolStrategy(size=num_workers),
                num_cpus=share.num_cpus,
                num_gpus=share.num_gpus,
            )
        for row in dataset.iter_rows():
            outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, Exception):
                raise outcome
            number = int(row["number"])
            journal.forget.remote([task.image_id for task in chunks[number]])
            yield number, list(map(_with_given_paths, outcome, chunks[number]))
    finally:
        ray.kill(journal)


def start_journal(ray: Any) -> Any:
    """Start the process of the journal on this machine, and return its handle."""
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    here = ray.get_runtime_context().get_node_id()
    strategy = strategies.NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=strategy)(Journal).remote()


def _with_absolute_paths(task: OutputTask) -> OutputTask:
    """Workers may have another current folder."""
    image = replace(task.image, path=task.image.path.absolute())
    outputs = {kind: _absolute(path) for kind, path in task.outputs.items()}
    raster_outputs = {kind: _absolute(path) for kind, path in task.raster_outputs.items()}
    return replace(task, image=image, outputs=outputs, raster_outputs=raster_outputs)


def _with_given_paths(result: FileResult, task: OutputTask) -> FileResult:
    is_raster = result.outputs == _with_absolute_paths(task).raster_outputs
    outputs = task.raster_outputs if is_raster else task.outputs
    return replace(result, image=task.image, outputs=outputs if result.outputs else {})


def _absolute(path: AnyPath) -> AnyPath:
    return path.absolute() if isinstance(path, Path) else path


def _split(tasks: Sequence[OutputTask], num_workers: int) -> list[Sequence[OutputTask]]:
    """Split tasks into chunks, small enough to keep all workers busy until the end."""
    size = max(1, min(CHUNK, len(tasks) // (4 * num_workers)))
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


def divide_cluster(
    nodes: Sequence[Mapping[str, float]], num_workers: int, *, uses_gpus: bool
) -> Share:
    """Choose the number of workers, and the largest number of CPUs of each with which all fit.

    Args:
        nodes: The resources of the machines, CPU and GPU.
        num_workers: 0: one for each GPU, or for each 4 CPUs.
        uses_gpus: Whether each worker gets a GPU, if there are any.
    """
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    has_gpus = uses_gpus and any(gpus)
    workers = num_workers or max(1, sum(gpus) if has_gpus else sum(cpus) // CPUS_PER_WORKER)

    def count_fitting(size: int) -> int:
        fitting = [count // size for count in cpus]
        return sum(map(min, fitting, gpus) if has_gpus else fitting)

    sizes = (size for size in range(max(cpus, default=1), 1, -1) if count_fitting(size) >= workers)
    return Share(workers, next(sizes, 1), int(has_gpus))


def _in_order(numbered: Iterable[tuple[int, list[FileResult]]]) -> Iterator[FileResult]:
    """Yield the results of chunk 0, 1, 2 ... as soon as the earlier ones are there."""
    waiting: dict[int, list[FileResult]] = {}
    number = 0
    for chunk_number, results in numbered:
        waiting[chunk_number] = results
        while number in waiting:
            yield from waiting.pop(number)
            number += 1


@contextmanager
def _quiet_context(context: Any) -> Iterator[None]:
    """Switch off what Ray Data prints, and its limit of the time without results."""
    changes = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": -1,  # some images take hours
    }
    before = {name: getattr(context, name) for name in changes if hasattr(context, name)}
    for name in before:
        setattr(context, name, changes[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
