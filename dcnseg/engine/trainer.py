"""The loop of a training run over its epochs; the entry point is `Trainer`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcnseg.checkpoint import BEST_WEIGHTS, RESUME_STATE, TrainingDataStats, save_weights
from dcnseg.config import TrainConfig
from dcnseg.data.transforms import Augmentation
from dcnseg.device import select_amp_dtype, select_device
from dcnseg.engine.batches import EpochBatches
from dcnseg.engine.evaluation import evaluate
from dcnseg.engine.event_writer import open_event_writer
from dcnseg.engine.initial_weights import InitialWeights
from dcnseg.engine.listener import RunSummary, TrainingListener
from dcnseg.engine.loading import TrainingLoader
from dcnseg.engine.losses import balance_classes, build_loss
from dcnseg.engine.not_finite import first_not_finite
from dcnseg.engine.offset_monitor import OffsetMonitor
from dcnseg.engine.out_of_memory import explain_out_of_memory, explain_out_of_memory_in_evaluation
from dcnseg.engine.preview import write_preview
from dcnseg.engine.progress import EpochReporter, PartialEpoch
from dcnseg.engine.random_states import restore_random_states, seed_epoch
from dcnseg.engine.run_folder import PREVIEW, add_file_to_errors, append_metrics, metrics_line
from dcnseg.engine.state import TrainingState, build_state, save_state
from dcnseg.engine.training_data import TrainingData, training_dataset
from dcnseg.engine.updates import Outcome, Updater
from dcnseg.errors import NotFiniteError, TrainingError, TrainingStoppedError
from dcnseg.inference.image_stats import summarize_training_images
from dcnseg.inference.predictor import Predictor


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        run: The run folder.
        best_epoch: The epoch whose weights were kept as the best.
        scores: Validation scores of that epoch: "mean_iou", "pixel_accuracy", "class_iou".
    """

    run: Path
    best_epoch: int
    scores: Mapping[str, Any]

    @property
    def class_iou(self) -> Mapping[str, float | None]:
        """IoU of each class by name; None for a class that does not occur."""
        return dict(self.scores.get("class_iou", {}))

    def predictor(self, **options: Any) -> Predictor:
        """Load the best weights; the options are those of `Predictor.from_checkpoint`."""
        return Predictor.from_checkpoint(self.run, **options)


class Trainer:
    """One run: the loop over epochs, readable from `run_epochs` downwards.

    What is on the disk is a state that the run can go on from at every moment. All that an epoch
    writes is written before the state that says the epoch is complete, and is written again,
    alike, by a run that goes on from an earlier state.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        data: TrainingData,
        listener: TrainingListener,
        *,
        encoder_weights: str,
        initial: InitialWeights | None = None,
        augment: Augmentation | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.data = data
        self.listener = listener
        self.device = select_device(config.device)
        self.amp_dtype = select_amp_dtype(config.amp, self.device)
        self.batches = EpochBatches(len(data.splits.train), config.batch_size, seed=config.seed)
        self.state: TrainingState = build_state(
            config,
            num_classes=data.class_map.num_classes,
            updates_per_epoch=math.ceil(len(self.batches) / config.accumulate),
            device=self.device,
            encoder_weights=encoder_weights,
            initial=initial,
        )
        weights = balance_classes(data.pixel_counts, config.class_weights)
        loss = build_loss(config.loss, None if weights is None else weights.to(self.device))
        self.updater = Updater(self.state, loss, self.device, self.amp_dtype)
        self.loader = TrainingLoader(
            training_dataset(config, data, self.state.preprocessing, augment),
            self.batches,
            workers=config.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        self._saved_at = time.monotonic()
        self._runaway_layers: set[str] = set()

    def run_epochs(self) -> TrainResult:
        """Train until the last epoch, or until the score has not improved for long enough."""
        self.listener.started(self._summary())
        if self.state.epoch == 0 and self.state.so_far is None:
            self._save()  # a disk without room is told now, and a kill in the first minutes is none
        with (
            open_event_writer(self.run if self.config.tensorboard else None) as write_events,
            self.loader.explain_worker_death(),
        ):
            try:
                for epoch in range(self.state.epoch + 1, self.config.epochs + 1):
                    record = self._run_epoch(epoch)
                    write_events(record)
                    self.listener.epoch_done(record, is_best=self.state.best_epoch == epoch)
                    if self.should_stop_early():
                        self.listener.stopped_early(epoch, self.config.patience)
                        break
                    if epoch < self.config.epochs:
                        self._stop_if_requested()
            finally:
                self.loader.close()
        if not self.state.best_epoch and self.state.epoch:
            raise TrainingError(
                f"No epoch of {self.run} has a score: the network's output for a validation image "
                "was never finite. Start a new run with a lower --lr or longer --warmup-epochs."
            )
        return TrainResult(self.run, self.state.best_epoch, self.state.best_scores or {})

    def should_stop_early(self) -> bool:
        """Whether the last complete epoch was the last of so many without a better score."""
        epoch = self.state.epoch
        stale_epochs = epoch - self.state.best_epoch
        return epoch > 0 and self._is_evaluated(epoch) and 0 < self.config.patience <= stale_epochs

    def _is_evaluated(self, epoch: int) -> bool:
        return epoch % self.config.eval_every == 0 or epoch == self.config.epochs

    def _run_epoch(self, epoch: int) -> dict[str, Any]:
        started = time.perf_counter()
        so_far = self._begin_epoch(epoch)
        record: dict[str, Any] = {"epoch": epoch, "lr": so_far.lr}
        record |= self._train_epoch(epoch, so_far)
        if self._is_evaluated(epoch):
            self._evaluate_epoch(epoch, record)
        record["seconds"] = round(time.perf_counter() - started, 2)
        self.state.epoch = epoch
        self.state.so_far = None
        # The state last: what it says is done must be on the disk already.
        append_metrics(self.run, record)
        self.state.metrics += metrics_line(record)
        is_final = epoch == self.config.epochs
        if is_final or epoch % self.config.checkpoint_epochs == 0:
            self._save(is_final=is_final)
        return record

    def _begin_epoch(self, epoch: int) -> PartialEpoch:
        """Start an epoch, or go on in its middle as if it had not been left."""
        if self.state.so_far is None:
            seed_epoch(self.config.seed, epoch)
            self.state.so_far = PartialEpoch(lr=float(self.state.schedule.get_last_lr()[0]))
        elif self.state.random is not None:
            restore_random_states(self.state.random)
        self.state.random = None
        return self.state.so_far

    def _train_epoch(self, epoch: int, so_far: PartialEpoch) -> dict[str, Any]:
        """The rest of a pass over the training images; returns the mean loss and the speed."""
        progress = EpochReporter(
            so_far,
            epoch=epoch,
            epochs=self.config.epochs,
            num_images=len(self.data.splits.train),
            listener=self.listener,
        )
        self.state.model.train()
        batches = self.loader.batches(epoch, start=so_far.step)
        for step, (images, labels) in enumerate(batches, so_far.step + 1):
            loss = self._add_batch(step, images, labels)
            is_update = step % self.config.accumulate == 0 or step == len(self.batches)
            if is_update:
                self._update(so_far)
            progress.step_done(step, len(images), loss)
            if is_update:
                self._stop_if_not_finite(epoch, step, images, labels)
                self._save_periodically()
                self._stop_if_requested()
        record: dict[str, Any] = {
            "loss": None if math.isnan(so_far.mean_loss) else so_far.mean_loss,
            "images_per_second": progress.images_per_second,
        }
        counts = {"skipped_steps": so_far.skipped, "amp_skipped_steps": so_far.amp_skipped}
        return record | {name: count for name, count in counts.items() if count}

    def _add_batch(self, step: int, images: Tensor, labels: Tensor) -> float:
        size_hw = images.shape[-2:]
        with explain_out_of_memory(size_hw, len(images), self.device):
            return self.updater.add_batch(images, labels, share=1 / self._group_size(step))

    def _group_size(self, step: int) -> int:
        """Batches of the update that batch `step`, from 1, belongs to; the last may have fewer."""
        first = (step - 1) // self.config.accumulate * self.config.accumulate
        return min(self.config.accumulate, len(self.batches) - first)

    def _update(self, so_far: PartialEpoch) -> None:
        outcome = self.updater.update()
        if outcome is Outcome.SCALED:
            so_far.amp_skipped += 1
        elif outcome is Outcome.SKIPPED:
            so_far.skipped += 1
            self.state.skipped_in_a_row += 1
        else:
            self.state.skipped_in_a_row = 0

    def _stop_if_not_finite(self, epoch: int, step: int, images: Tensor, labels: Tensor) -> None:
        count = self.state.skipped_in_a_row
        if count < self.config.nan_patience:
            return
        cause = first_not_finite(self.state.model, self.updater, images, labels)
        raise TrainingError(
            f"The loss or gradient of {count} steps in a row was not finite, up to step {step} of "
            f"epoch {epoch}; the first thing that is not finite there is {cause}. The last good "
            f"checkpoint is {self.run / RESUME_STATE}. Start a new run with a lower --lr, longer "
            "--warmup-epochs or --amp off."
        )

    def _save_periodically(self) -> None:
        interval = 60 * self.config.checkpoint_minutes
        if interval and time.monotonic() - self._saved_at >= interval:
            self._save()

    def _save(self, *, is_final: bool = False) -> None:
        """Write the state; after steps that were not finite keep the last good one instead."""
        if self.state.skipped_in_a_row and not is_final:
            return
        path = self.run / RESUME_STATE
        with add_file_to_errors(path):
            save_state(path, self.state)
        self._saved_at = time.monotonic()

    def _stop_if_requested(self) -> None:
        if self.listener.stop_requested():
            self._save()
            raise TrainingStoppedError(f"{self.run} was stopped; its state is saved.")

    def _evaluate_epoch(self, epoch: int, record: dict[str, Any]) -> None:
        """Add the validation scores to `record`; keep the weights if they are the best so far."""
        state, class_map = self.state, self.data.class_map
        model = state.evaluated_model
        # In float32, as `evaluate` and `predict` compute: the score here is the score there.
        predictor = Predictor(model, class_map, state.preprocessing, device=self.device)
        checkpoint = self.run / RESUME_STATE
        with (
            explain_out_of_memory_in_evaluation(self.device, checkpoint),
            OffsetMonitor(model) as monitor,
        ):
            try:
                scores = evaluate(
                    predictor,
                    self.data.splits.val,
                    on_progress=lambda _done, _total: self._stop_if_requested(),
                ).to_dict()
            except NotFiniteError as error:  # the next epochs may bring the weights back
                record["mean_iou"] = None
                self.listener.warned(f"Epoch {epoch} has no score. {error}")
                return
        record |= scores | {"offsets": monitor.summary()}
        if runaways := monitor.runaways():
            record["runaway_layers"] = list(runaways)
            self._warn_of_runaways(runaways)
        if state.best_scores is not None and (scores["mean_iou"] or 0) <= state.best_mean_iou:
            return
        state.best_epoch, state.best_scores = epoch, scores
        with add_file_to_errors(self.run / BEST_WEIGHTS):
            save_weights(
                self.run / BEST_WEIGHTS,
                model.state_dict(),
                model=self.config.model,
                class_map=class_map,
                preprocessing=state.preprocessing,
                scores={"epoch": epoch, "split": "val", **scores},
                training_data=self._training_data_stats,
            )
        with add_file_to_errors(self.run / PREVIEW):
            write_preview(self.run / PREVIEW, predictor, self.data.splits.val)

    @cached_property
    def _training_data_stats(self) -> TrainingDataStats:
        return summarize_training_images([sample.image for sample in self.data.splits.train])

    def _warn_of_runaways(self, runaways: Mapping[str, str]) -> None:
        """Tell of each layer once."""
        for name, text in runaways.items():
            if name not in self._runaway_layers:
                self._runaway_layers.add(name)
                self.listener.warned(text)

    def _summary(self) -> RunSummary:
        splits, model = self.data.splits, self.state.model
        return RunSummary(
            run=self.run,
            splits={
                "train": len(splits.train),
                "val": len(splits.val),
                "test": len(splits.test),
            },
            num_classes=self.data.class_map.num_classes,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            deformable_layers=tuple(model.deformable_layers()),
            device=str(self.device),
            number_format=str(self.amp_dtype or torch.float32).removeprefix("torch."),
            first_epoch=self.state.epoch + 1,
            epochs=self.config.epochs,
            steps_per_epoch=len(self.batches),
            best_mean_iou=(self.state.best_scores or {}).get("mean_iou"),
            batch_size=self.config.batch_size,
        )
