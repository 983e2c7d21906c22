"""What runs in the processes of Ray: `Worker`, and the `Journal` that outlives killed workers.

Ray gives the images of a killed worker to another one. The journal knows which of them are done,
so that none is predicted twice, and which have killed several workers, so that these fail instead
of killing one worker after the other. It is in memory, in a process of its own on the machine of
the command: an object store has no cheap way to tell a file of this call from an older one, and
clocks of machines differ. If the command itself ends, --skip-existing continues.
"""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from dcnseg.config import PredictConfig
from dcnseg.errors import DataError, DcnsegError
from dcnseg.inference.batch import predict_tasks
from dcnseg.inference.output_plan import OutputTask
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.remote_files import AnyPath, mark
from dcnseg.inference.results import FileResult, failed_result

MAX_ATTEMPTS: Final = 3  # of an image; the second and third are alone in their worker
_KILLED: Final = 1  # exit code of a worker that ends itself


class Journal:
    """Which images are done, and which ones workers have begun."""

    def __init__(self) -> None:
        self._finished: dict[int, FileResult] = {}
        self._attempts: Counter[int] = Counter()
        self._places: dict[int, str] = {}
        self._num_loading = 0

    def begin_loading(self) -> int:
        """Count a worker that loads the network; returns their number since one has loaded it."""
        self._num_loading += 1
        return self._num_loading

    def end_loading(self) -> None:
        """Note that a worker has loaded the network."""
        self._num_loading = 0

    def begin(self, image_ids: Sequence[int], place: str) -> tuple[dict[int, FileResult], set[int]]:
        """Note that the worker at `place` begins these images.

        Returns:
            The results of images that an earlier worker has finished, and the ids of other images
            that it had begun.
        """
        again = {one for one in image_ids if self._attempts[one] and one not in self._finished}
        for image_id in image_ids:
            if not self._attempts[image_id]:
                self._attempts[image_id] = 1
                self._places[image_id] = place
        return {one: self._finished[one] for one in image_ids if one in self._finished}, again

    def begin_again(self, image_id: int, place: str) -> tuple[int, str]:
        """Note another attempt at an image; returns the number of earlier ones and the last place.

        The place is unchanged after MAX_ATTEMPTS.
        """
        number, last = self._attempts[image_id], self._places[image_id]
        if number < MAX_ATTEMPTS:
            self._attempts[image_id] += 1
            self._places[image_id] = place
        return number, last

    def finish(self, image_id: int, result: FileResult) -> None:
        """Note that an image is done."""
        self._finished[image_id] = result

    def finished_ids(self) -> set[int]:
        """Return the ids of images that are done and not forgotten."""
        return set(self._finished)

    def places(self) -> dict[int, str]:
        """Return the place of the last attempt at each image that is not forgotten."""
        return dict(self._places)

    def forget(self, image_ids: Collection[int]) -> None:
        """Remove images whose results have reached the command."""
        for image_id in image_ids:
            self._finished.pop(image_id, None)
            self._attempts.pop(image_id, None)
            self._places.pop(image_id, None)


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs besides the weights and the images."""

    weights_name: str
    device: str
    amp: str
    config: PredictConfig
    opacity: float
    bands: Sequence[int]
    folders: Sequence[AnyPath]  # to mark as written by dcnseg
    num_threads: int
    num_workers: int


class Worker:
    """Loads the network once, and predicts lists of images; Ray Data calls it with each row.

    Args:
        weights: A reference to the content of the weights file.
        journal: The handle of the journal.
        settings: The settings.
    """

    def __init__(self, weights: Any, journal: Any, settings: WorkerSettings) -> None:
        import ray

        torch.set_num_threads(settings.num_threads)
        self._journal: Any = _RemoteJournal(journal)
        self._settings = settings
        self._outcome: Predictor | Exception
        if self._journal.begin_loading() > MAX_ATTEMPTS * settings.num_workers:
            self._outcome = DcnsegError(
                "the workers were killed while they loaded the network, probably because memory "
                "was exhausted. Use fewer --workers."
            )
            return
        try:
            self._outcome = load_predictor(ray.get(weights), settings)
        except Exception as error:  # reported by the command
            self._outcome = picklable(error)
        self._journal.end_loading()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Predict the images of a row; returns their results, or the error that ends the call."""
        outcome: list[FileResult] | Exception
        if isinstance(self._outcome, Exception):
            outcome = self._outcome
        else:
            tasks = pickle.loads(row["tasks"])
            try:
                outcome = predict_chunk(self._outcome, tasks, self._journal, self._settings)
            except torch.AcceleratorError:
                # The GPU is unusable in this process. Ray starts another one.
                traceback.print_exc()
                os._exit(_KILLED)
            except Exception as error:  # for example a full disk
                outcome = picklable(error)
        return {"number": row["number"], "outcome": pickle.dumps(outcome)}


class _RemoteJournal:
    """Calls the methods of a journal in another process, and waits for their results."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        import ray

        method = getattr(self._handle, name)
        return lambda *arguments: ray.get(method.remote(*arguments))


def load_predictor(weights: bytes, settings: WorkerSettings) -> Predictor:
    """Load a network from the content of a weights file."""
    with TemporaryDirectory(prefix="dcnseg-") as folder:
        path = Path(folder, settings.weights_name)
        path.write_bytes(weights)
        return Predictor.from_checkpoint(
            path, device=settings.device, amp=settings.amp, config=settings.config
        )


def predict_chunk(
    predictor: Predictor, tasks: Sequence[OutputTask], journal: Journal, settings: WorkerSettings
) -> list[FileResult]:
    """Predict images that no earlier worker has finished; returns the results of all.

    Images that an earlier worker had begun are predicted one by one, so that the journal tells
    which one kills the workers.
    """

    def mark_folders() -> None:
        for folder in settings.folders:
            mark(folder)

    def finish(task: OutputTask, result: FileResult) -> None:
        finished[task.image_id] = replace(result, cause=result.cause and picklable(result.cause))
        journal.finish(task.image_id, finished[task.image_id])

    def predict(chosen: Sequence[OutputTask]) -> None:
        for _ in predict_tasks(
            predictor,
            chosen,
            opacity=settings.opacity,
            bands=settings.bands,
            before_write=mark_folders,
            on_written=finish,
        ):
            pass

    place = f"process {os.getpid()} on {socket.gethostname()}"
    finished, again = journal.begin([task.image_id for task in tasks], place)
    predict([one for one in tasks if one.image_id not in again and one.image_id not in finished])
    for task in (one for one in tasks if one.image_id in again):
        number, last = journal.begin_again(task.image_id, place)
        if number < MAX_ATTEMPTS:
            predict([task])
        else:
            finish(task, failed_result(task.image, _killed_error(task, last)))
    return [finished[task.image_id] for task in tasks]


def _killed_error(task: OutputTask, place: str) -> DataError:
    return DataError(
        f"{task.image}: {MAX_ATTEMPTS} workers were killed while they predicted this image, the "
        f"last one was {place}. Memory may be exhausted: use a smaller --window or fewer "
        "--workers. Ray's logs have the reason."
    )


def picklable(error: Exception) -> Exception:
    """Return an error of dcnseg, the system or Python's memory itself; of others, the traceback."""
    if isinstance(error, DcnsegError | OSError | MemoryError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))
