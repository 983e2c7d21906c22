"""Evaluation of an epoch during training: scores, offset statistics, best weights, preview image.

Entry point: `EpochEvaluator`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dcnseg.checkpoint import BEST_WEIGHTS, RESUME_STATE, TrainingDataStats, save_weights
from dcnseg.config import PredictConfig, TrainConfig
from dcnseg.device import explain_out_of_memory
from dcnseg.engine.distributed import SINGLE, World
from dcnseg.engine.evaluation import evaluate
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.run_folder import PREVIEW, explain_write_errors, write_scores
from dcnseg.engine.run_images import write_preview
from dcnseg.engine.state import TrainingState
from dcnseg.engine.training_data import TrainingData
from dcnseg.errors import NotFiniteError, TrainingError
from dcnseg.inference.image_stats import summarize_training_images
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import Segmenter
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.ops.offset_stats import OffsetStatistics, offset_statistics
from dcnseg.scoring.scores import Scores

MONITORED_PASSES = 8  # enough for a mean; more would slow down the evaluation
MAX_OUTSIDE_SHARE = 0.5  # of the sampling positions
STATISTICS = ("mean_px", "p95_px", "outside_share", "grid_outside_share")
ADVICE = (
    "This is expected in the first hundred steps, while the batch norm statistics are not yet "
    "stable. If it persists, lower --offset-lr-scale or --lr, or choose another --encoder."
)


@dataclass
class EpochEvaluator:
    """Evaluates the model on the validation images, and keeps the best epoch's weights."""

    config: TrainConfig
    run: Path
    data: TrainingData
    state: TrainingState
    device: torch.device
    listener: TrainingListener
    world: World = SINGLE
    _reported_layers: set[str] = field(default_factory=set)

    def evaluate(self, epoch: int, on_image: Callable[[], None]) -> dict[str, Any]:
        """Return an epoch's scores and offset statistics; save the weights if they are the best.

        `on_image` is called after each image. Several processes share the images; each returns the
        scores of all, and the main one saves the weights.
        """
        model = self.state.evaluated_model
        # In float32 like `evaluate` and `predict`, so that the scores are the same.
        predictor = Predictor(
            model, self.data.class_map, self.state.preprocessing, device=self.device
        )
        with explain_out_of_memory(self._out_of_memory_error), OffsetMonitor(model) as monitor:

            def on_progress(_done: int, _total: int) -> None:
                monitor.next_image()
                on_image()

            try:
                details = evaluate(
                    predictor, self.data.splits.val, on_progress=on_progress, world=self.world
                )
            except NotFiniteError as error:  # later epochs may recover
                self.listener.warned(f"Epoch {epoch} has no score. {error}")
                return {"mean_iou": None}
        monitor.join(self.world)
        scores = details.to_dict()
        result = scores | {"offsets": monitor.summary()}
        if runaways := monitor.runaways():
            result["runaway_layers"] = list(runaways)
            for name, text in runaways.items():
                if name not in self._reported_layers:  # once per run
                    self._reported_layers.add(name)
                    self.listener.warned(text)
        best = self.state.best_scores
        if best is None or (scores["mean_iou"] or 0) > self.state.best_mean_iou:
            self._keep_best(epoch, details, predictor)
        return result

    def _keep_best(self, epoch: int, details: Scores, predictor: Predictor) -> None:
        state, splits, scores = self.state, self.data.splits, details.to_dict()
        state.best_epoch, state.best_scores = epoch, scores
        if not self.world.is_main:
            return
        with explain_write_errors(self.run / BEST_WEIGHTS):
            save_weights(
                self.run / BEST_WEIGHTS,
                state.evaluated_model.state_dict(),
                model=self.config.model,
                class_map=self.data.class_map,
                preprocessing=state.preprocessing,
                scores={"epoch": epoch, "split": "val", **scores},
                training_data=self._training_data_stats,
            )
        with explain_write_errors(self.run / PREVIEW):
            write_preview(self.run / PREVIEW, predictor, splits.val, details)
        record = {"epoch": epoch, "split": "val", **details.to_detailed_dict()}
        write_scores(self.run, record | {"train_pixels": self.data.pixel_counts.tolist()})

    @cached_property
    def _training_data_stats(self) -> TrainingDataStats:
        return summarize_training_images([sample.image for sample in self.data.splits.train])

    def _out_of_memory_error(self) -> TrainingError:
        return TrainingError(
            f"Out of memory on {self.device} for a validation image in windows of "
            f"{PredictConfig.window} pixels. Use smaller images, or start a new run with a lower "
            f"--input-scale. The last checkpoint is {self.run / RESUME_STATE}."
        )


class _Pass(NamedTuple):
    """A forward pass of a layer: number of the image, longer side of the map, statistics."""

    image: int
    size_px: int
    statistics: OffsetStatistics


class OffsetMonitor:
    """Records the offsets of the deformable layers in the first forward passes in its context.

    with OffsetMonitor(model) as monitor:
        evaluate(...)
    monitor.summary()  # {"encoder.layer4.2.conv2": {"mean_px": 0.7, ...}}
    """

    def __init__(self, model: Segmenter) -> None:
        self._layers = model.deformable_layers()
        self._image = 0
        self._seen: dict[str, list[_Pass]] = defaultdict(list)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Start recording."""
        for name, layer in self._layers.items():
            hook = partial(self._record, name, layer)
            self._handles.append(layer.conv_offset.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()

    def next_image(self) -> None:
        """Note that the following passes are of another image."""
        self._image += 1

    def join(self, world: World) -> None:
        """Join the passes of all processes: the result is that of one process with all images."""
        seen = world.gather(dict(self._seen))
        for name in self._layers:
            passes = [
                (each.image * world.size + rank, each)
                for rank, of_process in enumerate(seen)
                for each in of_process.get(name, ())
            ]
            passes.sort(key=lambda numbered: numbered[0])
            self._seen[name] = [each for _, each in passes[:MONITORED_PASSES]]

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Each layer's statistics, averaged over the recorded passes; None if not finite."""
        return {
            name: {
                key: round(mean, 5) if math.isfinite(mean) else None
                for key, mean in self._means(name).items()
            }
            for name in self._layers
            if self._seen[name]
        }

    def runaways(self) -> dict[str, str]:
        """A warning for each layer that samples far outside its feature map, by layer name."""
        reasons = {name: self._runaway_reason(name) for name in self._layers if self._seen[name]}
        return {name: f"{name}: {reason} {ADVICE}" for name, reason in reasons.items() if reason}

    def _runaway_reason(self, name: str) -> str | None:
        """Explain why the offsets are too large, if they are; NaN counts as too large."""
        means, size_px = self._means(name), max(each.size_px for each in self._seen[name])
        if not means["p95_px"] <= size_px:
            return (
                f"the 95th percentile of the offsets is {means['p95_px']:.0f} px, but the longer "
                f"side of the feature map is only {size_px} px."
            )
        # On a small feature map, a dilated kernel is mostly outside even without offsets.
        outside = means["outside_share"]
        if outside > max(MAX_OUTSIDE_SHARE, means["grid_outside_share"]):
            return (
                f"a fraction of {outside:.2f} of the sampling points lies outside the feature map."
            )
        return None

    def _means(self, name: str) -> dict[str, float]:
        seen = [each.statistics for each in self._seen[name]]
        return {key: sum(getattr(e, key) for e in seen) / len(seen) for key in STATISTICS}

    def _record(
        self, name: str, layer: DeformConv2d, _module: object, inputs: Any, offset: Tensor
    ) -> None:
        if len(self._seen[name]) < MONITORED_PASSES:
            height, width = inputs[0].shape[-2:]
            statistics = offset_statistics(layer, offset, (height, width))
            self._seen[name].append(_Pass(self._image, max(height, width), statistics))
