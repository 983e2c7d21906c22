"""Results of the images of a call; entry points `FileResult` and `failed_result`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import ClassMap
from dcnseg.errors import DataError, DcnsegError
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.remote_files import AnyPath


@dataclass(frozen=True)
class FileResult:
    """Result of one image. The class shares and `share_below` add up to 1."""

    image: InputImage
    outputs: dict[str, AnyPath]  # files written or already present, by kind; empty after an error
    class_shares: dict[str, float]  # share of the pixels of each predicted class, by name
    share_below: float = 0.0  # share of the pixels below the minimum confidence
    error: str | None = None  # error message if there is no prediction
    cause: Exception | None = None  # the exception behind `error`
    size_hw: tuple[int, int] = (0, 0)  # in pixels; (0, 0) if it was not read
    unlike_training: tuple[str, ...] = ()  # differences, from `compare_with_training`
    has_more_frames: bool = False  # whether further pages or frames were ignored
    is_skipped: bool = False  # whether all outputs were already present

    @property
    def is_predicted(self) -> bool:
        """Whether a prediction was made and written."""
        return self.error is None and not self.is_skipped

    @property
    def is_unexpected(self) -> bool:
        """Whether the error is of a type that dcnseg does not expect."""
        return not isinstance(self.cause, DcnsegError | OSError | MemoryError | None)


def failed_result(image: InputImage, error: Exception) -> FileResult:
    """Return the result of an image whose reading, prediction or writing raised `error`."""
    return FileResult(image, {}, {}, error=describe_error(image, error), cause=error)


def describe_error(image: InputImage, error: Exception) -> str:
    """Describe an error in one line that names the image."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, DcnsegError):
        return f"{image}: {error}"
    if isinstance(error, MemoryError):
        return f"{image}: out of memory."
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{image}: {place}{error.strerror or error}"
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"{image}: unexpected error: {reason}"


def count_shares(prediction: Prediction) -> tuple[float, dict[str, float]]:
    """Return the share of pixels below the minimum confidence, and the shares of the classes."""
    counts = np.zeros(256, np.int64)
    for row in prediction.labels:  # bincount of the whole image would convert it to int64
        counts += np.bincount(row, minlength=256)
    return round_shares(counts, prediction.class_map)


def round_shares(
    counts: npt.NDArray[np.int64], class_map: ClassMap
) -> tuple[float, dict[str, float]]:
    """Like `count_shares`, of the number of pixels of each training index [256]."""
    total = max(1, int(counts.sum()))
    shares = {
        name: round(float(count / total), 6)
        for name, count in zip(class_map.names, counts, strict=False)
        if count
    }
    return round(float(counts[-1] / total), 6), shares
