"""Writing of predictions: label maps, overlays and more; entry point `write_prediction`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePath
from typing import Final

import numpy as np
import numpy.typing as npt

from dcnseg.config import OVERLAY_OPACITY
from dcnseg.data.image_io import write_jpeg_strips, write_png
from dcnseg.errors import ConfigError
from dcnseg.files import atomic_path
from dcnseg.inference.overlay import draw_legend, draw_overlay_strips, present_classes
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.region_files import write_region_results
from dcnseg.inference.region_overlay import Mark, draw_marks
from dcnseg.inference.remote_files import AnyPath, local_outputs

OUTPUT_FOLDERS: Final = {
    "labels": "labels",
    "overlay": "overlays",
    "confidence": "confidence",
    "probabilities": "probabilities",
    "regions": "regions",
}
OUTPUT_KINDS: Final = tuple(OUTPUT_FOLDERS)
_SUFFIXES: Final = {
    "labels": ".png",
    "overlay": ".jpg",
    "confidence": ".png",
    "probabilities": ".npz",
    "regions": ".json",
}
_RASTER_SUFFIXES: Final = {"labels": ".tif", "confidence": ".tif"}
_ROWS: Final = 256  # rows processed at a time, to keep temporary arrays small


def check_output_kinds(kinds: Collection[str]) -> None:
    """Raise a ConfigError if `kinds` is empty or has a kind that is not in OUTPUT_KINDS."""
    wrong = [repr(kind) for kind in kinds if kind not in OUTPUT_KINDS]
    if wrong or not kinds:
        found = wrong[0] if wrong else "empty"
        raise ConfigError(f"--save is {found}; expected one or more of {', '.join(OUTPUT_KINDS)}.")


def get_output_paths(
    folder: AnyPath, name: PurePath, kinds: Collection[str], *, is_raster: bool = False
) -> dict[str, AnyPath]:
    """Return the path of each kind of output of the image `name`.

    With `is_raster`, of an image that is predicted window by window.
    """
    suffixes = _SUFFIXES | (_RASTER_SUFFIXES if is_raster else {})
    return {
        kind: folder / OUTPUT_FOLDERS[kind] / f"{name.as_posix()}{suffixes[kind]}"
        for kind in OUTPUT_KINDS
        if kind in kinds
    }


def write_prediction(
    prediction: Prediction,
    image: npt.NDArray[np.uint8],
    paths: Mapping[str, AnyPath],
    *,
    opacity: float = OVERLAY_OPACITY,
    image_id: int = 1,
) -> None:
    """Write the outputs of one image, each atomically, the label map last.

    Args:
        prediction: Prediction, with confidence and probabilities if they are in `paths`.
        image: The image, RGB uint8 [H, W, 3].
        paths: Paths by kind, from `get_output_paths`.
        opacity: Of the overlay's colors, in [0, 1].
        image_id: The id of the image in the file of regions.
    """
    with local_outputs(paths) as local:
        _write_local(prediction, image, local, opacity, image_id)


def _write_local(
    prediction: Prediction,
    image: npt.NDArray[np.uint8],
    paths: Mapping[str, Path],
    opacity: float,
    image_id: int,
) -> None:
    class_map = prediction.class_map
    if "overlay" in paths:
        _write_overlay(paths["overlay"], image, prediction, opacity)
    if "confidence" in paths:
        assert prediction.confidence is not None
        write_png(paths["confidence"], confidence_to_gray(prediction.confidence))
    if "probabilities" in paths:
        assert prediction.probabilities is not None
        with atomic_path(paths["probabilities"]) as temporary:
            np.savez_compressed(
                temporary,
                probabilities=prediction.probabilities,
                ids=np.array(class_map.ids),
                names=np.array(class_map.names),
            )
    if "regions" in paths:
        write_region_results(paths["regions"], prediction, image_id)
    if "labels" in paths:  # last, because its presence marks the image as done
        write_png(paths["labels"], prediction.label_map, palette=class_map.palette())


def _write_overlay(
    path: Path, image: npt.NDArray[np.uint8], prediction: Prediction, opacity: float
) -> None:
    """Write an overlay, with boxes of the regions, and a legend of the image's classes below it."""
    class_map, labels = prediction.class_map, prediction.labels
    present = present_classes(labels, class_map.num_classes)
    legend = draw_legend(class_map, present, image.shape[1])
    strips = draw_overlay_strips(image, labels, class_map, opacity=opacity)
    size_hw = image.shape[0] + len(legend), image.shape[1]
    marked = _with_marks(strips, prediction.region_marks())
    write_jpeg_strips(path, size_hw, chain(marked, [legend]))


def _with_marks(
    strips: Iterable[npt.NDArray[np.uint8]], marks: Sequence[Mark]
) -> Iterator[npt.NDArray[np.uint8]]:
    top = 0
    for strip in strips:
        draw_marks(strip, marks, top)
        yield strip
        top += len(strip)


def confidence_to_gray(confidence: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """Convert confidence [H, W] in [0, 1] to gray levels in 0..255."""
    gray = np.empty(confidence.shape, np.uint8)
    for rows in _split_rows(len(confidence)):
        gray[rows] = np.rint(confidence[rows].astype(np.float32) * 255)
    return gray


def _split_rows(height: int) -> Iterator[slice]:
    return (slice(top, top + _ROWS) for top in range(0, height, _ROWS))
