"""Prediction of many files, with decoding and writing in parallel; entry point `predict_files`."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from dcnseg.config import OVERLAY_OPACITY
from dcnseg.data.image_io import ImageHeader, read_header
from dcnseg.device import explain_out_of_memory, free_memory
from dcnseg.errors import ConfigError, DataError
from dcnseg.files import has_unmarked_files, is_output_folder, mark_output_folder
from dcnseg.inference.image_stats import compare_with_training
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.read_ahead import read_ahead
from dcnseg.inference.region_files import MERGED_REGIONS, merge_region_results
from dcnseg.inference.results import FileResult, count_shares, failed_result
from dcnseg.inference.writers import OUTPUT_FOLDERS, get_output_paths, write_prediction

WRITE_BEHIND = 3  # unwritten predictions in memory
LARGE_PIXELS: Final = 1 << 24  # larger images are processed alone, to limit memory
MIN_WINDOW: Final = 64

# Errors that the next image would hit as well.
_FATAL_ERRNOS: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Job:
    """An image being decoded; `header` is None if it cannot be read."""

    image: InputImage
    header: ImageHeader | None
    decoded: Future[Image | Exception]


def predict_files(
    predictor: Predictor,
    images: Sequence[InputImage],
    out: Path,
    kinds: Sequence[str],
    *,
    opacity: float = OVERLAY_OPACITY,
    skip_existing: bool = False,
    on_result: Callable[[FileResult], None] | None = None,
) -> list[FileResult]:
    """Predict images and write the outputs; an unreadable image does not stop the others.

    The output folder is marked as written by dcnseg, or only its subfolders if it has other files.
    `kinds` are outputs to write, see OUTPUT_KINDS; the regions of all images are also merged into
    OUT/regions.json. `opacity` is that of overlays, from 0 (outlines only) to 1. With
    `skip_existing`, images with all outputs present are skipped; their results come first.
    `on_result` is called with each result in order, after its files are written.

    Raises:
        ConfigError: An output subfolder has files that dcnseg did not write, or regions are wanted
            of a network without region head.
        DataError: The regions of a skipped image cannot be read.
        OSError: Outputs cannot be written, for example because the disk is full.
    """
    if "regions" in kinds:
        predictor.region_head()  # fail early
    results: list[FileResult] = []

    def finish(result: FileResult) -> None:
        results.append(result)
        if on_result:
            on_result(result)

    image_ids = {image: number for number, image in enumerate(images, 1)}
    outputs = {image: get_output_paths(out, image.name, kinds) for image in images}
    folders = _find_folders_to_mark(out, kinds)
    remaining = []
    for image in images:
        if skip_existing and all(path.is_file() for path in outputs[image].values()):
            finish(FileResult(image, outputs[image], {}, is_skipped=True))
        else:
            remaining.append(image)
    with ThreadPoolExecutor(max_workers=2) as pool:
        writing: deque[Future[FileResult]] = deque()
        for job in _read_ahead(pool, remaining):
            outcome = _predict(predictor, job, kinds)
            if not isinstance(outcome, Exception):
                for folder in folders:
                    mark_output_folder(folder)
            paths = outputs[job.image]
            image_id = image_ids[job.image]
            writing.append(pool.submit(_write, predictor, job, outcome, paths, opacity, image_id))
            del outcome  # frees its memory after writing
            while len(writing) > (0 if _is_large(job.header) else WRITE_BEHIND):
                finish(writing.popleft().result())
        for future in writing:
            finish(future.result())
    if "regions" in kinds and any("regions" in result.outputs for result in results):
        by_id = {image_ids[result.image]: result for result in results}
        merge_region_results(out, by_id, predictor.class_map)
    return results


def _find_folders_to_mark(out: Path, kinds: Sequence[str]) -> tuple[Path, ...]:
    """Return the output folder, or its subfolders if it has files that dcnseg did not write.

    Raises:
        ConfigError: A subfolder has such files (masks, for example), which could be overwritten.
    """
    if not has_unmarked_files(out):
        return (out,)
    folders = tuple(out / OUTPUT_FOLDERS[kind] for kind in kinds)
    merged, regions = out / MERGED_REGIONS, out / OUTPUT_FOLDERS["regions"]
    if "regions" in kinds and merged.exists() and not is_output_folder(regions):
        raise ConfigError(
            f"--out is {out}, but {merged} exists and was not written by dcnseg. Use another "
            "--out, or rename the file."
        )
    for folder in folders:
        if has_unmarked_files(folder):
            raise ConfigError(
                f"--out is {out}, but {folder} contains files and is not marked as dcnseg output; "
                "predictions could overwrite the files. Use another --out, or delete the folder if "
                "it contains only old predictions."
            )
    return folders


def _read_ahead(pool: ThreadPoolExecutor, images: Sequence[InputImage]) -> Iterator[_Job]:
    """Decode the next images while one is in use, but a large one alone."""
    items = ((image, _try_read_header(image)) for image in images)
    for (image, header), decoded in read_ahead(
        pool, items, lambda item: _try_read(item[0]), is_large=lambda item: _is_large(item[1])
    ):
        yield _Job(image, header, decoded)


def _is_large(header: ImageHeader | None) -> bool:
    return header is not None and header.num_pixels >= LARGE_PIXELS


def _try_read_header(image: InputImage) -> ImageHeader | None:
    try:
        return None if image.problem else read_header(image.path)
    except DataError:
        return None  # reading the image raises the error


def _try_read(image: InputImage) -> Image | Exception:
    try:
        return image.read()
    except Exception as error:  # reported with the image's result
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
            _check_probabilities_fit(path, size_hw, predictor.class_map.num_classes)
        with explain_out_of_memory(lambda: _out_of_memory_error(path, size_hw, predictor)):
            return decoded, predictor.predict(
                decoded,
                with_confidence="confidence" in kinds,
                with_probabilities="probabilities" in kinds,
                regions="regions" in kinds,
            )
    except torch.AcceleratorError:
        raise  # the device is unusable from here on
    except Exception as error:
        return error


def _check_probabilities_fit(path: Path, size_hw: Sequence[int], num_classes: int) -> None:
    """Raise a DataError if the probabilities of an image need more memory than is free."""
    needed, free = 2 * num_classes * size_hw[0] * size_hw[1], free_memory()
    if needed > free:
        raise DataError(
            f"{path}: the probabilities of {num_classes} classes for {size_hw[1]}x{size_hw[0]} "
            f"pixels need {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free. Split the "
            "image, or use --save confidence instead of probabilities."
        )


def _out_of_memory_error(path: Path, size_hw: Sequence[int], predictor: Predictor) -> DataError:
    """Build an error that names the image and suggests a smaller window."""
    longest = max(size_hw) * predictor.preprocessing.input_scale
    used = int(min(predictor.config.window, longest))
    smaller = max(MIN_WINDOW, used // 2)
    advice = f"Use --window {smaller}" if smaller < used else "Resize the image"
    return DataError(
        f"{path}: out of memory on {predictor.device} for an image of "
        f"{size_hw[1]}x{size_hw[0]} pixels with --window {predictor.config.window}. {advice}."
    )


def _write(
    predictor: Predictor,
    job: _Job,
    outcome: tuple[Image, Prediction] | Exception,
    paths: dict[str, Path],
    opacity: float,
    image_id: int,
) -> FileResult:
    if isinstance(outcome, Exception):
        return failed_result(job.image, outcome)
    decoded, prediction = outcome
    try:
        write_prediction(prediction, decoded, paths, opacity=opacity, image_id=image_id)
        stats = predictor.training_data
        below, shares = count_shares(prediction)
        return FileResult(
            job.image,
            paths,
            shares,
            share_below=below,
            size_hw=(decoded.shape[0], decoded.shape[1]),
            unlike_training=() if stats is None else compare_with_training(decoded, stats),
            has_more_frames=job.header is not None and job.header.has_more_frames,
        )
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:  # for example on a full disk
            error.filename = str(next(iter(paths.values())))
        if isinstance(error, OSError) and error.errno in _FATAL_ERRNOS:
            raise
        return failed_result(job.image, error)
