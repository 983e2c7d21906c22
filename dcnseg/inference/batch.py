"""Many pictures in, many files out; decoding and writing overlap with the network.

Entry point: `predict_files`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dcnseg.data.image_io import read_image
from dcnseg.errors import DcnsegError
from dcnseg.inference.familiarity import differences
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.memory import names_what_to_try
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
        outputs: Files written, or there already, by kind; empty after an error.
        class_shares: Share of the pixels of each predicted class, by name; empty if none was made.
        error: Why there is no prediction, or None.
        size_hw: Height and width in pixels; (0, 0) if it was not read.
        unlike_training: In what it is much unlike the training's pictures, as `differences` says.
        is_skipped: Whether all outputs were there before.
    """

    image: InputImage
    outputs: dict[str, Path]
    class_shares: dict[str, float]
    error: str | None = None
    size_hw: tuple[int, int] = (0, 0)
    unlike_training: tuple[str, ...] = ()
    is_skipped: bool = False


def predict_files(
    predictor: Predictor,
    images: Sequence[InputImage],
    out: Path,
    kinds: Sequence[str],
    *,
    skip_existing: bool = False,
    on_result: Callable[[FileResult], None] | None = None,
) -> list[FileResult]:
    """Predict every picture and write the outputs; a broken picture does not stop the others.

    Args:
        predictor: The network.
        images: Pictures and the names of their outputs.
        out: Output folder.
        kinds: Which of "labels", "overlay" and "probabilities" to write.
        skip_existing: Leave out pictures all of whose outputs are there; their results come first.
        on_result: Called with each result in order, once its files are complete.

    Raises:
        OSError: an output cannot be written; those before it are complete.
    """
    results: list[FileResult] = []

    def finish(result: FileResult) -> None:
        results.append(result)
        if on_result:
            on_result(result)

    outputs = {image: output_paths(out, image.name, kinds) for image in images}
    skipped = [image for image in images if skip_existing and _are_files(outputs[image].values())]
    for image in skipped:
        finish(FileResult(image, outputs[image], {}, is_skipped=True))
    left = [image for image in images if image not in set(skipped)] if skipped else images
    with ThreadPoolExecutor(max_workers=2) as pool:
        writing: list[Future[FileResult]] = []
        for image, decoded in _read_ahead(pool, left):
            outcome = _predict(predictor, image, decoded, "probabilities" in kinds)
            writing.append(pool.submit(_write, predictor, image, outcome, outputs[image]))
            if len(writing) > WRITE_BEHIND:
                finish(writing.pop(0).result())
        for future in writing:
            finish(future.result())
    return results


def _are_files(paths: Iterable[Path]) -> bool:
    return all(path.is_file() for path in paths)


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
    predictor: Predictor,
    image: InputImage,
    decoded: Image | DcnsegError,
    with_probabilities: bool,
) -> tuple[Image, Prediction] | DcnsegError:
    if isinstance(decoded, DcnsegError):
        return decoded
    try:
        with names_what_to_try(image.path, decoded.shape[:2], predictor):
            return decoded, predictor.predict(decoded, with_probabilities=with_probabilities)
    except DcnsegError as error:
        return error


def _write(
    predictor: Predictor,
    image: InputImage,
    outcome: tuple[Image, Prediction] | DcnsegError,
    paths: dict[str, Path],
) -> FileResult:
    if isinstance(outcome, DcnsegError):
        return FileResult(image, {}, {}, str(outcome))
    decoded, prediction = outcome
    seen = predictor.training_data
    try:
        write_prediction(prediction, decoded, predictor.class_map, paths)
    except OSError as error:
        if error.filename is None:  # as where the disk is full
            error.filename = str(next(iter(paths.values())))
        raise
    counts = np.bincount(prediction.labels.ravel(), minlength=predictor.class_map.num_classes)
    shares = {
        name: round(float(count / prediction.labels.size), 6)
        for name, count in zip(predictor.class_map.names, counts, strict=True)
        if count
    }
    return FileResult(
        image,
        paths,
        shares,
        size_hw=(decoded.shape[0], decoded.shape[1]),
        unlike_training=() if seen is None else differences(decoded, seen),
    )
