"""Prediction of many files, with decoding and writing in parallel; entry point `predict_files`."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from dcnseg.config import OVERLAY_OPACITY
from dcnseg.data.image_io import ImageHeader, read_header, read_image
from dcnseg.data.raster_file import check_bands, open_raster, suggest_rasterio
from dcnseg.device import explain_out_of_memory, free_memory
from dcnseg.errors import DataError
from dcnseg.inference.huge_image import (
    OnWindow,
    check_raster_outputs,
    is_read_by_windows,
    needs_whole_image,
    predict_raster,
)
from dcnseg.inference.image_stats import compare_size_and_color, compare_with_training
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.output_plan import OutputTask, plan_outputs
from dcnseg.inference.parts import Part
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.read_ahead import read_ahead
from dcnseg.inference.remote_files import AnyPath, local_copy, local_outputs
from dcnseg.inference.results import FileResult, count_shares, failed_result
from dcnseg.inference.writers import write_prediction

WRITE_BEHIND = 3  # unwritten predictions in memory
LARGE_PIXELS: Final = 1 << 24  # larger images are processed alone, to limit memory
MIN_WINDOW: Final = 64

# Errors that the next image would hit as well.
_FATAL_ERRNOS: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Decoded:
    pixels: Image
    header: ImageHeader


@dataclass(frozen=True)
class _Job:
    """An image to predict.

    Attributes:
        task: The image, and the files to write.
        header: None if the image is at a URL or cannot be read as a whole.
        is_raster: Whether the image is read window by window.
    """

    task: OutputTask
    header: ImageHeader | None
    is_raster: bool

    @property
    def is_large(self) -> bool:
        """Whether the image is processed alone."""
        is_large = self.header is not None and self.header.num_pixels >= LARGE_PIXELS
        return is_large or self.is_raster


def predict_files(
    predictor: Predictor,
    images: Sequence[InputImage],
    out: AnyPath,
    kinds: Sequence[str],
    *,
    opacity: float = OVERLAY_OPACITY,
    skip_existing: bool = False,
    refuse_existing: bool = False,
    part: Part | None = None,
    bands: Sequence[int] = (),
    on_result: Callable[[FileResult], None] | None = None,
    on_window: OnWindow | None = None,
) -> list[FileResult]:
    """Predict images and write the outputs; an unreadable image does not stop the others.

    The output folder `out`, which may be a URL, is marked as written by dcnseg, or only its
    subfolders if it has other files. `kinds` are outputs to write, see OUTPUT_KINDS; the regions of
    all images are also merged into OUT/regions.json. `opacity` is that of overlays, from 0
    (outlines only) to 1. With `skip_existing`, images with all outputs present are skipped; their
    results come first. With `refuse_existing`, no output may be present. With `part`, only that
    part of the images is predicted; the merged regions of part 3/16 are in
    OUT/regions-3-of-16.json. `on_result` is called with each result in order, after its files are
    written.

    With rasterio, georeferenced images and those that are too large or have too many bands to be
    read as a whole are predicted window by window, see `predict_raster`, and so are all images if
    `bands` gives the numbers of their bands for red, green and blue. `on_window` is called with the
    number of predicted windows of such an image, and of all of its windows.

    Raises:
        ConfigError: An output subfolder has files that dcnseg did not write, outputs exist and
            `refuse_existing` is set, regions are wanted of a network without region head, or
            `bands` are not three numbers from 1 or rasterio is not installed.
        DataError: The regions of a skipped image cannot be read.
        OSError: Outputs cannot be written, for example because the disk is full.
    """
    if "regions" in kinds:
        predictor.region_head()  # fail early
    check_bands(bands)
    if bands:
        check_raster_outputs(predictor, kinds)
    plan = plan_outputs(
        images,
        out,
        kinds,
        skip_existing=skip_existing,
        refuse_existing=refuse_existing,
        part=part,
    )
    results: list[FileResult] = []
    for result in chain(
        plan.skipped_results(),
        predict_tasks(
            predictor,
            plan.tasks,
            opacity=opacity,
            bands=bands,
            before_write=plan.mark_folders,
            on_window=on_window,
        ),
    ):
        results.append(result)
        if on_result:
            on_result(result)
    plan.merge_regions(results, predictor.class_map)
    return results


def predict_tasks(
    predictor: Predictor,
    tasks: Sequence[OutputTask],
    *,
    opacity: float,
    before_write: Callable[[], None],
    bands: Sequence[int] = (),
    on_written: Callable[[OutputTask, FileResult], None] = lambda _task, _result: None,
    on_window: OnWindow | None = None,
) -> Iterator[FileResult]:
    """Predict images and write their outputs; yields each result in order, after writing.

    `before_write` is called once, before the first file is written; `on_written` in a thread, as
    soon as an image is done. `bands` and `on_window` are those of `predict_files`.
    """
    before_write = cache(before_write)
    with ThreadPoolExecutor(max_workers=2) as pool:
        writing: deque[Future[FileResult]] = deque()
        jobs = _make_jobs(predictor, tasks, has_bands=bool(bands))
        # Decodes the next images while one is in use, but a large one alone.
        for job, decoded in read_ahead(pool, jobs, _try_read, is_large=lambda job: job.is_large):
            if job.is_raster:
                while writing:
                    yield writing.popleft().result()
                result = _predict_raster(predictor, job, bands, opacity, before_write, on_window)
                on_written(job.task, result)
                yield result
                continue
            outcome = _predict(predictor, job, decoded)
            if not isinstance(outcome, Exception):
                before_write()
            writing.append(pool.submit(_finish, predictor, job, outcome, opacity, on_written))
            del outcome  # frees its memory after writing
            while len(writing) > (0 if job.is_large else WRITE_BEHIND):
                yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()


def _make_jobs(
    predictor: Predictor, tasks: Sequence[OutputTask], *, has_bands: bool
) -> Iterator[_Job]:
    for task in tasks:
        image, header = task.image, _try_read_header(task.image)
        is_local = not image.problem and not image.url
        yield _Job(
            task,
            header,
            is_local
            and is_read_by_windows(
                image.path,
                is_readable=header is not None,
                needs_whole=needs_whole_image(predictor, task.outputs),
                has_bands=has_bands,
            ),
        )


def _try_read_header(image: InputImage) -> ImageHeader | None:
    try:
        # A URL would delay the images before it; its size is known after the download.
        return None if image.problem or image.url else read_header(image.path)
    except DataError:
        return None  # reading the image raises the error


def _try_read(job: _Job) -> _Decoded | Exception | None:
    """Decode an image, unless it is read window by window."""
    image = job.task.image
    try:
        if job.is_raster:
            return None
        if job.header:
            return _Decoded(image.read(), job.header)
        if image.problem:
            raise DataError(image.problem)
        with local_copy(image.location) as path:
            return _Decoded(read_image(path), read_header(path))
    except DataError as error:
        return suggest_rasterio(error)
    except Exception as error:  # reported with the image's result
        return error


def _predict_raster(
    predictor: Predictor,
    job: _Job,
    bands: Sequence[int],
    opacity: float,
    before_write: Callable[[], None],
    on_window: OnWindow | None,
) -> FileResult:
    """Predict an image window by window, and write its outputs."""
    image, paths = job.task.image, job.task.raster_outputs
    try:
        with open_raster(image.path, bands) as raster, local_outputs(paths) as local:
            make_error = partial(_out_of_memory_error, image, raster.size_hw, predictor)
            check_raster_outputs(predictor, paths)
            before_write()
            with explain_out_of_memory(make_error):
                summary = predict_raster(
                    predictor, raster, local, opacity=opacity, on_window=on_window
                )
            stats = predictor.training_data
            return FileResult(
                image,
                paths,
                summary.class_shares,
                share_below=summary.share_below,
                size_hw=summary.size_hw,
                unlike_training=()
                if stats is None
                else compare_size_and_color(summary.size_hw, lambda: summary.is_gray, stats),
                has_more_frames=raster.has_more_frames,
            )
    except torch.AcceleratorError:
        raise  # the device is unusable from here on
    except Exception as error:
        return _failed_output(image, error, paths)


def _predict(
    predictor: Predictor, job: _Job, future: Future[_Decoded | Exception | None]
) -> tuple[_Decoded, Prediction] | Exception:
    decoded = future.result()
    if isinstance(decoded, Exception):
        return decoded
    assert decoded is not None
    image, size_hw, kinds = job.task.image, decoded.pixels.shape[:2], job.task.outputs
    try:
        if "probabilities" in kinds:
            _check_probabilities_fit(image, size_hw, predictor.class_map.num_classes)
        with explain_out_of_memory(lambda: _out_of_memory_error(image, size_hw, predictor)):
            return decoded, predictor.predict(
                decoded.pixels,
                with_confidence="confidence" in kinds,
                with_probabilities="probabilities" in kinds,
                regions="regions" in kinds,
            )
    except torch.AcceleratorError:
        raise  # the device is unusable from here on
    except Exception as error:
        return error


def _check_probabilities_fit(image: InputImage, size_hw: Sequence[int], num_classes: int) -> None:
    """Raise a DataError if the probabilities of an image need more memory than is free."""
    needed, free = 2 * num_classes * size_hw[0] * size_hw[1], free_memory()
    if needed > free:
        raise DataError(
            f"{image}: the probabilities of {num_classes} classes for {size_hw[1]}x{size_hw[0]} "
            f"pixels need {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free. Split the "
            "image, or use --save confidence instead of probabilities."
        )


def _out_of_memory_error(
    image: InputImage, size_hw: Sequence[int], predictor: Predictor
) -> DataError:
    """Build an error that names the image and suggests a smaller window."""
    longest = max(size_hw) * predictor.preprocessing.input_scale
    used = int(min(predictor.config.window, longest))
    smaller = max(MIN_WINDOW, used // 2)
    advice = f"Use --window {smaller}" if smaller < used else "Resize the image"
    return DataError(
        f"{image}: out of memory on {predictor.device} for an image of "
        f"{size_hw[1]}x{size_hw[0]} pixels with --window {predictor.config.window}. {advice}."
    )


def _finish(
    predictor: Predictor,
    job: _Job,
    outcome: tuple[_Decoded, Prediction] | Exception,
    opacity: float,
    on_written: Callable[[OutputTask, FileResult], None],
) -> FileResult:
    if isinstance(outcome, Exception):
        result = failed_result(job.task.image, outcome)
    else:
        result = _write(predictor, job.task, *outcome, opacity)
    on_written(job.task, result)
    return result


def _write(
    predictor: Predictor,
    task: OutputTask,
    decoded: _Decoded,
    prediction: Prediction,
    opacity: float,
) -> FileResult:
    image, paths, pixels = task.image, task.outputs, decoded.pixels
    try:
        write_prediction(prediction, pixels, paths, opacity=opacity, image_id=task.image_id)
        stats = predictor.training_data
        below, shares = count_shares(prediction)
        return FileResult(
            image,
            paths,
            shares,
            share_below=below,
            size_hw=(pixels.shape[0], pixels.shape[1]),
            unlike_training=() if stats is None else compare_with_training(pixels, stats),
            has_more_frames=decoded.header.has_more_frames,
        )
    except Exception as error:
        return _failed_output(image, error, paths)


def _failed_output(image: InputImage, error: Exception, paths: Mapping[str, AnyPath]) -> FileResult:
    """Return the result of an image whose outputs could not be written.

    Raises:
        OSError: `error`, if the next image would fail too.
    """
    if isinstance(error, OSError) and error.filename is None:  # for example on a full disk
        error.filename = str(next(iter(paths.values())))
    if isinstance(error, OSError) and error.errno in _FATAL_ERRNOS:
        raise error
    return failed_result(image, error)
