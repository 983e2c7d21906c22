"""What became of each image of a call; entry points `FileResult` and `failed_result`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcnseg.errors import DataError, DcnsegError
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.prediction import Prediction


@dataclass(frozen=True)
class FileResult:
    """What became of one image.

    Attributes:
        image: The image.
        outputs: Files written, or there already, by kind; empty after an error.
        class_shares: Share of the pixels of each predicted class, by name; empty if none was made.
        share_below: Share of the pixels below the minimum confidence; with the shares of the
            classes it is 1.
        error: Why there is no prediction, or None.
        cause: The exception behind `error`.
        size_hw: Height and width in pixels; (0, 0) if it was not read.
        unlike_training: In what it is much unlike the training's images, as `differences` says.
        has_more_frames: Whether its file has further pages or frames, which are not read.
        is_skipped: Whether all outputs were there before.
    """

    image: InputImage
    outputs: dict[str, Path]
    class_shares: dict[str, float]
    share_below: float = 0.0
    error: str | None = None
    cause: Exception | None = None
    size_hw: tuple[int, int] = (0, 0)
    unlike_training: tuple[str, ...] = ()
    has_more_frames: bool = False
    is_skipped: bool = False

    @property
    def is_predicted(self) -> bool:
        """Whether a prediction was made and written."""
        return self.error is None and not self.is_skipped

    @property
    def is_unexpected(self) -> bool:
        """Whether the error is none that dcnseg foresees."""
        return not isinstance(self.cause, DcnsegError | OSError | MemoryError | None)


def failed_result(image: InputImage, error: Exception) -> FileResult:
    """The result of an image whose reading, prediction or writing raised `error`."""
    return FileResult(image, {}, {}, error=describe_error(image, error), cause=error)


def describe_error(image: InputImage, error: Exception) -> str:
    """What went wrong, in one line that begins with the image's name."""
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, DcnsegError):
        return f"{image}: {error}"
    if isinstance(error, MemoryError):
        return f"{image}: does not fit into memory."
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{image}: {place}{error.strerror or error}"
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"{image}: unexpected {reason}"


def count_shares(prediction: Prediction) -> tuple[float, dict[str, float]]:
    """The share of the pixels below the minimum confidence, and that of each class found."""
    counts = np.zeros(256, np.int64)
    for row in prediction.labels:  # bincount of all pixels would make them 64-bit numbers
        counts += np.bincount(row, minlength=256)
    shares = {
        name: round(float(count / prediction.labels.size), 6)
        for name, count in zip(prediction.class_map.names, counts, strict=False)
        if count
    }
    return round(float(counts[-1] / prediction.labels.size), 6), shares
