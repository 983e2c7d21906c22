"""Training of a segmenter on a folder of pictures and masks; entry points `train` and `resume`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dcnseg.checkpoint import BEST_WEIGHTS, RESUME_STATE, load_resume_state, save_weights
from dcnseg.config import TrainConfig
from dcnseg.device import select_amp_dtype, select_device
from dcnseg.engine.batches import EpochBatches
from dcnseg.engine.evaluation import evaluate
from dcnseg.engine.event_writer import open_event_writer, require_tensorboard
from dcnseg.engine.listener import RunSummary, TrainingListener
from dcnseg.engine.losses import balance_classes, build_loss
from dcnseg.engine.offset_monitor import OffsetMonitor
from dcnseg.engine.preview import write_preview
from dcnseg.engine.progress import EpochProgress
from dcnseg.engine.run_folder import (
    PREVIEW,
    append_metrics,
    check_classes_are_unchanged,
    check_run_is_free,
    check_split_is_unchanged,
    create_run,
    drop_metrics_after,
    read_run,
    update_settings,
)
from dcnseg.engine.state import TrainingState, build_state, restore_state, save_state
from dcnseg.engine.training_data import (
    TrainingData,
    find_training_splits,
    prepare_data,
    training_dataset,
)
from dcnseg.errors import ConfigError, TrainingError
from dcnseg.inference.predictor import Predictor
from dcnseg.models.pretrained import NO_WEIGHTS, require_encoder_weights
from dcnseg.models.segmenter import build_segmenter


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: its folder, the best epoch, and that epoch's validation scores."""

    run: Path
    best_epoch: int
    scores: Mapping[str, Any]


def train(
    config: TrainConfig,
    run: Path,
    *,
    sources: Mapping[str, str] | None = None,
    overwrite: bool = False,
    listener: TrainingListener | None = None,
) -> TrainResult:
    """Train a network and write a run folder.

    Args:
        config: All settings.
        run: The run folder; new, empty, or to be overwritten.
        sources: Where each setting came from, kept in config.json.
        overwrite: Whether the files of a former run in the folder may be replaced.
        listener: Told what happens.

    Raises:
        ConfigError: a setting cannot be met, or the folder is not empty.
        DataError: a picture or mask is wrong; the message names it.
        TrainingError: the loss is not finite.
    """
    listener = listener or TrainingListener()
    check_run_is_free(run, overwrite=overwrite)
    splits = find_training_splits(config)
    # A setting that cannot be met is told before the masks are read, which may take minutes.
    select_amp_dtype(config.amp, select_device(config.device))
    build_segmenter(config.model, num_classes=2)
    require_encoder_weights(config.model.encoder, config.encoder_weights)
    if config.tensorboard:
        require_tensorboard()
    data = prepare_data(config, splits, on_progress=listener.checking)
    trainer = Trainer(config, run, data, listener, encoder_weights=config.encoder_weights)
    create_run(run, config, sources or {}, data.class_map, data.splits, overwrite=overwrite)
    return trainer.run_epochs()


def resume(
    run: Path,
    *,
    epochs: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    listener: TrainingListener | None = None,
) -> TrainResult:
    """Go on with a run after its last complete epoch, as if it had never stopped.

    Args:
        run: A run folder.
        epochs: Another number of epochs in all; the learning rate follows the new schedule.
        device: Another device.
        workers: Another number of loading processes.
        listener: Told what happens.

    Raises:
        ConfigError: all epochs are done.
        CheckpointError: the folder holds nothing to resume, or its files are damaged.
        DataError: the data has changed since the run began.
    """
    listener = listener or TrainingListener()
    record = read_run(run)
    saved = load_resume_state(run / RESUME_STATE)
    before = record.config
    config = replace(
        before,
        epochs=before.epochs if epochs is None else epochs,
        device=before.device if device is None else device,
        data=replace(before.data, workers=before.data.workers if workers is None else workers),
    )
    if saved["epoch"] >= config.epochs:
        raise ConfigError(
            f"{run} is complete: {saved['epoch']} of {config.epochs} epochs are done. "
            f"To train on, give more --epochs than {saved['epoch']}."
        )
    splits = find_training_splits(config)
    check_split_is_unchanged(record, splits)
    data = prepare_data(config, splits, on_progress=listener.checking)
    check_classes_are_unchanged(record, data.class_map)
    trainer = Trainer(config, run, data, listener, encoder_weights=NO_WEIGHTS)
    restore_state(trainer.state, saved)
    given = {"epochs": epochs, "device": device, "data.workers": workers}
    update_settings(run, config, [name for name, value in given.items() if value is not None])
    drop_metrics_after(run, trainer.state.epoch)
    return trainer.run_epochs()


class Trainer:
    """One run: the loop over epochs, readable from `run_epochs` downwards."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        data: TrainingData,
        listener: TrainingListener,
        *,
        encoder_weights: str,
    ) -> None:
        self.config = config
        self.run = run
        self.data = data
        self.listener = listener
        self.device = select_device(config.device)
        self.amp_dtype = select_amp_dtype(config.amp, self.device)
        weights = balance_classes(data.pixel_counts, config.class_weights)
        self.loss = build_loss(config.loss, None if weights is None else weights.to(self.device))
        self.batches = EpochBatches(len(data.splits.train), config.batch_size, seed=config.seed)
        self.state: TrainingState = build_state(
            config,
            num_classes=data.class_map.num_classes,
            updates_per_epoch=math.ceil(len(self.batches) / config.accumulate),
            device=self.device,
            encoder_weights=encoder_weights,
        )
        self.dataset = training_dataset(config, data, self.state.preprocessing)
        workers = min(config.data.workers, len(self.batches))
        self.loader = DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, so that the workers' seeds cost dropout none
        )

    def run_epochs(self) -> TrainResult:
        """Train until the last epoch, or until the score has not improved for long enough."""
        config, state = self.config, self.state
        self.listener.started(self._summary())
        with open_event_writer(self.run if config.tensorboard else None) as write_events:
            for epoch in range(state.epoch + 1, config.epochs + 1):
                record = self._run_epoch(epoch)
                write_events(record)
                self.listener.epoch_done(record, is_best=state.best_epoch == epoch)
                if self._has_lost_patience(epoch):
                    self.listener.stopped_early(epoch, config.patience)
                    break
        return TrainResult(self.run, state.best_epoch, state.best_scores or {})

    def _is_evaluated(self, epoch: int) -> bool:
        return epoch % self.config.eval_every == 0 or epoch == self.config.epochs

    def _has_lost_patience(self, epoch: int) -> bool:
        stale_epochs = epoch - self.state.best_epoch
        return self._is_evaluated(epoch) and 0 < self.config.patience <= stale_epochs

    def _run_epoch(self, epoch: int) -> dict[str, Any]:
        started = time.perf_counter()
        record: dict[str, Any] = {"epoch": epoch, "lr": self.state.schedule.get_last_lr()[0]}
        record |= self._train_epoch(epoch)
        if self._is_evaluated(epoch):
            self._evaluate_epoch(epoch, record)
        record["seconds"] = round(time.perf_counter() - started, 2)
        self.state.epoch = epoch
        # The state last: what it says is done must be on the disk already.
        append_metrics(self.run, record)
        save_state(self.run / RESUME_STATE, self.state)
        return record

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training pictures; returns the mean loss and the speed."""
        torch.manual_seed(self.config.seed * 1_000_003 + epoch)  # dropout: the same after a resume
        self.dataset.set_epoch(epoch)
        self.batches.epoch = epoch
        progress = EpochProgress(epoch, self.config.epochs, len(self.dataset), self.listener)
        self.state.model.train()
        for step, (images, labels) in enumerate(self.loader, 1):
            loss = self._backward(images, labels, share=1 / self._group_size(step))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"The loss is {loss} at step {step} of epoch {epoch}. Start a new run with a "
                    "lower --lr, longer --warmup-epochs or --amp off; what was complete of this "
                    "one is kept."
                )
            if step % self.config.accumulate == 0 or step == len(self.batches):
                self._update()
            progress.step_done(step, len(images), loss)
        return {"loss": progress.mean_loss, "images_per_second": progress.images_per_second}

    def _group_size(self, step: int) -> int:
        """Batches of the update that batch `step`, from 1, belongs to; the last may have fewer."""
        first = (step - 1) // self.config.accumulate * self.config.accumulate
        return min(self.config.accumulate, len(self.batches) - first)

    def _backward(self, images: Tensor, labels: Tensor, *, share: float) -> float:
        """Add the gradient of `share` times the batch's loss; returns the loss."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        with torch.autocast(
            self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            logits = self.state.model(images)
        loss = self.loss(logits, labels)
        self.state.scaler.scale(loss * share).backward()
        return float(loss.detach())

    def _update(self) -> None:
        state = self.state
        scale = state.scaler.get_scale()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.scaler.get_scale() < scale:
            return  # float16 overflowed and the optimizer did nothing; it will at the lower scale
        state.schedule.step()
        if state.average is not None:
            state.average.update_parameters(state.model)

    def _evaluate_epoch(self, epoch: int, record: dict[str, Any]) -> None:
        """Add the validation scores to `record`; keep the weights if they are the best so far."""
        state, class_map = self.state, self.data.class_map
        model = state.evaluated_model
        # In float32, as `evaluate` and `predict` compute: the score here is the score there.
        predictor = Predictor(model, class_map, state.preprocessing, device=self.device)
        with OffsetMonitor(model) as monitor:
            scores = evaluate(predictor, self.data.splits.val).to_dict()
        record |= scores | {"offsets": monitor.summary()}
        if state.best_scores is not None and (scores["mean_iou"] or 0) <= state.best_mean_iou:
            return
        state.best_epoch, state.best_scores = epoch, scores
        save_weights(
            self.run / BEST_WEIGHTS,
            model.state_dict(),
            model=self.config.model,
            class_map=class_map,
            preprocessing=state.preprocessing,
            scores={"epoch": epoch, "split": "val", **scores},
        )
        write_preview(self.run / PREVIEW, predictor, self.data.splits.val)

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
        )
