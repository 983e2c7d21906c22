"""Many images in, many files out; decoding and writing overlap with the network.

Entry point: `predict_files`.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from dcnseg.data.image_io import ImageHeader, read_header
from dcnseg.device import explain_out_of_memory
from dcnseg.errors import ConfigError, DataError
from dcnseg.files import has_foreign_files, mark_output_folder
from dcnseg.inference.image_stats import differences_from_training
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.memory import check_probabilities_fit, out_of_memory_error
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.read_ahead import read_ahead
from dcnseg.inference.results import FileResult, count_shares, failed_result
from dcnseg.inference.writers import OUTPUT_FOLDERS, output_paths, write_prediction

WRITE_BEHIND = 3  # predictions that wait for the disk
LARGE_PIXELS: Final = 1 << 24  # from here on one image at a time, so that memory stays bounded

# What the next image would meet as well.
_FATAL_ERRNOS: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Job:
    """One image on its way: its header if it can be read, and the array or what went wrong."""

    image: InputImage
    header: ImageHeader | None
    decoded: Future[Image | Exception]

    @property
    def is_large(self) -> bool:
        return _is_large(self.header)


def predict_files(
    predictor: Predictor,
    images: Sequence[InputImage],
    out: Path,
    kinds: Sequence[str],
    *,
    skip_existing: bool = False,
    on_result: Callable[[FileResult], None] | None = None,
) -> list[FileResult]:
    """Predict every image and write the outputs; a broken image does not stop the others.

    The output folder is marked as dcnseg's, or, where it holds files of others, its subfolders.

    Args:
        predictor: The network.
        images: Images and the names of their outputs.
        out: Output folder.
        kinds: Which of "labels", "overlay", "confidence" and "probabilities" to write.
        skip_existing: Leave out images all of whose outputs are there; their results come first.
        on_result: Called with each result in order, once its files are complete.

    Raises:
        ConfigError: files of others lie where outputs are to be written.
        OSError: no output can be written, as on a full disk; those before it are complete.
    """
    results: list[FileResult] = []

    def finish(result: FileResult) -> None:
        results.append(result)
        if on_result:
            on_result(result)

    outputs = {image: output_paths(out, image.name, kinds) for image in images}
    marked = _folders_to_mark(out, kinds)
    skipped = [image for image in images if skip_existing and _are_files(outputs[image].values())]
    for image in skipped:
        finish(FileResult(image, outputs[image], {}, is_skipped=True))
    left = [image for image in images if image not in set(skipped)] if skipped else images
    with ThreadPoolExecutor(max_workers=2) as pool:
        writing: deque[Future[FileResult]] = deque()
        for job in _read_ahead(pool, left):
            outcome = _predict(predictor, job, kinds)
            if not isinstance(outcome, Exception):
                for folder in marked:
                    mark_output_folder(folder)
            writing.append(pool.submit(_write, predictor, job, outcome, outputs[job.image]))
            del outcome  # its memory is free as soon as it is written
            while len(writing) > (0 if job.is_large else WRITE_BEHIND):
                finish(writing.popleft().result())
        for future in writing:
            finish(future.result())
    return results


def _folders_to_mark(out: Path, kinds: Sequence[str]) -> tuple[Path, ...]:
    """The output folder, or its subfolders where it holds files of others itself.

    Raises:
        ConfigError: such a subfolder holds files that dcnseg did not write, such as masks.
    """
    if not has_foreign_files(out):
        return (out,)
    folders = tuple(out / OUTPUT_FOLDERS[kind] for kind in kinds)
    for folder in folders:
        if has_foreign_files(folder):
            raise ConfigError(
                f"--out is {out}, and {folder} holds files that dcnseg did not write, or did not "
                "mark as written; predictions could replace them. Choose another folder for --out, "
                "or delete that one if it holds predictions."
            )
    return folders


def _are_files(paths: Iterable[Path]) -> bool:
    return all(path.is_file() for path in paths)


def _read_ahead(pool: ThreadPoolExecutor, images: Sequence[InputImage]) -> Iterator[_Job]:
    """Decode the next images while one is in use, but a large one alone."""
    items = ((image, _peek(image)) for image in images)
    for (image, header), decoded in read_ahead(
        pool, items, lambda item: _read(item[0]), is_large=lambda item: _is_large(item[1])
    ):
        yield _Job(image, header, decoded)


def _is_large(header: ImageHeader | None) -> bool:
    return header is not None and header.num_pixels >= LARGE_PIXELS


def _peek(image: InputImage) -> ImageHeader | None:
    try:
        return None if image.problem else read_header(image.path)
    except DataError:
        return None  # reading it tells


def _read(image: InputImage) -> Image | Exception:
    try:
        return image.read()
    except Exception as error:  # whatever it is, it is this image's
        return error


def _predict(
    predictor: Predictor, job: _Job, kinds: Sequence[str]
) -> tuple[Image, Prediction] | Exception:
    decoded = job.decoded.result()
    if isinstance(decoded, Exception):
        return decoded
    path, size_hw = job.image.path, decoded.shape[:2]
    try:
        if "probabilities" in kinds:
            check_probabilities_fit(path, size_hw, predictor.class_map.num_classes)
        with explain_out_of_memory(lambda: out_of_memory_error(path, size_hw, predictor)):
            return decoded, predictor.predict(
                decoded,
                with_confidence="confidence" in kinds,
                with_probabilities="probabilities" in kinds,
            )
    except torch.AcceleratorError:
        raise  # no later image can be predicted either
    except Exception as error:
        return error


def _write(
    predictor: Predictor,
    job: _Job,
    outcome: tuple[Image, Prediction] | Exception,
    paths: dict[str, Path],
) -> FileResult:
    if isinstance(outcome, Exception):
        return failed_result(job.image, outcome)
    decoded, prediction = outcome
    try:
        write_prediction(prediction, decoded, paths)
        seen = predictor.training_data
        below, shares = count_shares(prediction)
        return FileResult(
            job.image,
            paths,
            shares,
            share_below=below,
            size_hw=(decoded.shape[0], decoded.shape[1]),
            unlike_training=() if seen is None else differences_from_training(decoded, seen),
            has_more_frames=job.header is not None and job.header.has_more_frames,
        )
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:  # as where the disk is full
            error.filename = str(next(iter(paths.values())))
        if isinstance(error, OSError) and error.errno in _FATAL_ERRNOS:
            raise
        return failed_result(job.image, error)
