"""Evaluation of an epoch during training: scores, best weights and preview image.

Entry point: `EpochEvaluator`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from dcnseg.checkpoint import BEST_WEIGHTS, RESUME_STATE, TrainingDataStats, save_weights
from dcnseg.config import PredictConfig, TrainConfig
from dcnseg.data.dataset import load_pair
from dcnseg.data.image_io import write_jpeg
from dcnseg.data.sample import Sample
from dcnseg.device import explain_out_of_memory
from dcnseg.engine.evaluation import evaluate
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.offset_monitor import OffsetMonitor
from dcnseg.engine.run_folder import PREVIEW, explain_write_errors
from dcnseg.engine.state import TrainingState
from dcnseg.engine.training_data import TrainingData
from dcnseg.errors import NotFiniteError, TrainingError
from dcnseg.inference.image_stats import summarize_training_images
from dcnseg.inference.prediction import draw_overlay
from dcnseg.inference.predictor import Predictor

PREVIEW_ROWS = 4
CELL_WIDTH = 420  # pixels
GAP = 6  # pixels between cells


class EpochEvaluator:
    """Evaluates the model on the validation images, and keeps the best epoch's weights."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        data: TrainingData,
        state: TrainingState,
        device: torch.device,
        listener: TrainingListener,
    ) -> None:
        self._config = config
        self._run = run
        self._data = data
        self._state = state
        self._device = device
        self._listener = listener
        self._reported_layers: set[str] = set()

    def evaluate(self, epoch: int, on_image: Callable[[], None]) -> dict[str, Any]:
        """Return an epoch's scores and offset statistics; save the weights if they are the best.

        `on_image` is called after each image.
        """
        model = self._state.evaluated_model
        # In float32 like `evaluate` and `predict`, so that the scores are the same.
        predictor = Predictor(
            model, self._data.class_map, self._state.preprocessing, device=self._device
        )
        with explain_out_of_memory(self._out_of_memory_error), OffsetMonitor(model) as monitor:
            try:
                scores = evaluate(
                    predictor, self._data.splits.val, on_progress=lambda _done, _total: on_image()
                ).to_dict()
            except NotFiniteError as error:  # later epochs may recover
                self._listener.warned(f"Epoch {epoch} has no score. {error}")
                return {"mean_iou": None}
        result = scores | {"offsets": monitor.summary()}
        if runaways := monitor.runaways():
            result["runaway_layers"] = list(runaways)
            self._warn_of_runaways(runaways)
        best = self._state.best_scores
        if best is None or (scores["mean_iou"] or 0) > self._state.best_mean_iou:
            self._keep_best(epoch, scores, predictor)
        return result

    def _keep_best(self, epoch: int, scores: dict[str, Any], predictor: Predictor) -> None:
        state, splits = self._state, self._data.splits
        state.best_epoch, state.best_scores = epoch, scores
        with explain_write_errors(self._run / BEST_WEIGHTS):
            save_weights(
                self._run / BEST_WEIGHTS,
                state.evaluated_model.state_dict(),
                model=self._config.model,
                class_map=self._data.class_map,
                preprocessing=state.preprocessing,
                scores={"epoch": epoch, "split": "val", **scores},
                training_data=self._training_data_stats,
            )
        with explain_write_errors(self._run / PREVIEW):
            write_preview(self._run / PREVIEW, predictor, splits.val)

    @cached_property
    def _training_data_stats(self) -> TrainingDataStats:
        return summarize_training_images([sample.image for sample in self._data.splits.train])

    def _warn_of_runaways(self, runaways: Mapping[str, str]) -> None:
        """Warn about each layer once per run."""
        for name, text in runaways.items():
            if name not in self._reported_layers:
                self._reported_layers.add(name)
                self._listener.warned(text)

    def _out_of_memory_error(self) -> TrainingError:
        return TrainingError(
            f"Out of memory on {self._device} for a validation image in windows of "
            f"{PredictConfig.window} pixels. Use smaller images, or start a new run with a lower "
            f"--input-scale. The last checkpoint is {self._run / RESUME_STATE}."
        )


def write_preview(path: Path, predictor: Predictor, samples: Sequence[Sample]) -> None:
    """Write an image with rows of image, mask and prediction for up to four samples."""
    count = min(len(samples), PREVIEW_ROWS)
    indices = [round((i + 0.5) * len(samples) / count - 0.5) for i in range(count)]  # evenly spaced
    rows = [_preview_row(predictor, samples[i]) for i in indices]
    gap = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    stacked = [part for row in rows for part in (row, gap)][:-1]
    write_jpeg(path, np.concatenate(stacked))


def _preview_row(predictor: Predictor, sample: Sample) -> npt.NDArray[np.uint8]:
    image, labels = load_pair(sample, predictor.class_map)
    predicted = predictor.predict(image).labels
    size = CELL_WIDTH, max(1, round(image.shape[0] * CELL_WIDTH / image.shape[1]))
    gap = np.full((size[1], GAP, 3), 255, np.uint8)
    cells = [
        cv2.resize(cell, size, interpolation=cv2.INTER_AREA)
        for cell in (
            image,
            draw_overlay(image, labels, predictor.class_map),
            draw_overlay(image, predicted, predictor.class_map),
        )
    ]
    return np.concatenate([cells[0], gap, cells[1], gap, cells[2]], axis=1)
