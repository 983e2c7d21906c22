"""An image of a few predictions beside the truth, for a quick look at a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.data.dataset import load_pair
from dcnseg.data.image_io import write_jpeg
from dcnseg.data.sample import Sample
from dcnseg.inference.prediction import draw_overlay
from dcnseg.inference.predictor import Predictor

PREVIEW_ROWS = 4
CELL_WIDTH = 420  # pixels
GAP = 6


def write_preview(path: Path, predictor: Predictor, samples: Sequence[Sample]) -> None:
    """Write rows of image, mask and prediction for a few samples spread over `samples`."""
    chosen = [samples[i] for i in _spread(len(samples), PREVIEW_ROWS)]
    rows = [_row(predictor, sample) for sample in chosen]
    gap = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    stacked = [part for row in rows for part in (row, gap)][:-1]
    write_jpeg(path, np.concatenate(stacked))


def _spread(length: int, count: int) -> list[int]:
    count = min(length, count)
    return [round((i + 0.5) * length / count - 0.5) for i in range(count)]


def _row(predictor: Predictor, sample: Sample) -> npt.NDArray[np.uint8]:
    image, truth = load_pair(sample, predictor.class_map)
    predicted = predictor.predict(image).labels
    size = CELL_WIDTH, max(1, round(image.shape[0] * CELL_WIDTH / image.shape[1]))
    gap = np.full((size[1], GAP, 3), 255, np.uint8)
    cells = [
        cv2.resize(cell, size, interpolation=cv2.INTER_AREA)
        for cell in (
            image,
            draw_overlay(image, truth, predictor.class_map),
            draw_overlay(image, predicted, predictor.class_map),
        )
    ]
    return np.concatenate([cells[0], gap, cells[1], gap, cells[2]], axis=1)
