"""Many pictures in, many files out; decoding and writing overlap with the network.

Entry point: `predict_files`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dcnseg.data.image_io import read_image
from dcnseg.errors import DcnsegError
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.predictor import Prediction, Predictor
from dcnseg.inference.writers import output_paths, write_prediction

READ_AHEAD = 3  # decoded pictures that wait for the network
WRITE_BEHIND = 3  # predictions that wait for the disk

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class FileResult:
    """What became of one picture.

    Attributes:
        image: The picture.
        outputs: Files written, by kind; empty after an error.
        class_shares: Share of the pixels of each predicted class, by name.
        error: Why there is no prediction, or None.
    """

    image: InputImage
    outputs: dict[str, Path]
    class_shares: dict[str, float]
    error: str | None = None


def predict_files(
    predictor: Predictor,
    images: Sequence[InputImage],
    out: Path,
    kinds: Sequence[str],
    *,
    on_result: Callable[[FileResult], None] | None = None,
) -> list[FileResult]:
    """Predict every picture and write the outputs; a broken picture does not stop the others.

    Args:
        predictor: The network.
        images: Pictures and the names of their outputs.
        out: Output folder.
        kinds: Which of "labels", "overlay" and "probabilities" to write.
        on_result: Called with each result in order, once its files are complete.
    """
    results: list[FileResult] = []

    def finish(future: Future[FileResult]) -> None:
        results.append(future.result())
        if on_result:
            on_result(results[-1])

    with ThreadPoolExecutor(max_workers=2) as pool:
        writing: list[Future[FileResult]] = []
        for image, decoded in _read_ahead(pool, images):
            outcome = _predict(predictor, decoded, with_probabilities="probabilities" in kinds)
            paths = output_paths(out, image.name, kinds)
            writing.append(pool.submit(_write, predictor, image, outcome, paths))
            if len(writing) > WRITE_BEHIND:
                finish(writing.pop(0))
        for future in writing:
            finish(future)
    return results


def _read_ahead(
    pool: ThreadPoolExecutor, images: Sequence[InputImage]
) -> Iterator[tuple[InputImage, Image | DcnsegError]]:
    def read(image: InputImage) -> Image | DcnsegError:
        try:
            return read_image(image.path)
        except DcnsegError as error:
            return error

    waiting: list[tuple[InputImage, Future[Image | DcnsegError]]] = []
    for image in images:
        waiting.append((image, pool.submit(read, image)))
        if len(waiting) > READ_AHEAD:
            first, future = waiting.pop(0)
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _predict(
    predictor: Predictor, decoded: Image | DcnsegError, *, with_probabilities: bool
) -> tuple[Image, Prediction] | DcnsegError:
    if isinstance(decoded, DcnsegError):
        return decoded
    return decoded, predictor.predict(decoded, with_probabilities=with_probabilities)


def _write(
    predictor: Predictor,
    image: InputImage,
    outcome: tuple[Image, Prediction] | DcnsegError,
    paths: dict[str, Path],
) -> FileResult:
    if isinstance(outcome, DcnsegError):
        return FileResult(image, {}, {}, str(outcome))
    decoded, prediction = outcome
    write_prediction(prediction, decoded, predictor.class_map, paths)
    counts = np.bincount(prediction.labels.ravel(), minlength=predictor.class_map.num_classes)
    shares = {
        name: round(float(count / prediction.labels.size), 6)
        for name, count in zip(predictor.class_map.names, counts, strict=True)
        if count
    }
    return FileResult(image, paths, shares)
