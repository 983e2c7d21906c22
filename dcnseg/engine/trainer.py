"""The training loop; the entry point is `Trainer`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcnseg.config import TrainConfig
from dcnseg.data.transforms import Augmentation
from dcnseg.device import select_amp_dtype, select_device
from dcnseg.engine.batch_size import explain_training_out_of_memory
from dcnseg.engine.distributed import SINGLE, World, least_images
from dcnseg.engine.epoch_evaluation import EpochEvaluator
from dcnseg.engine.initial_weights import InitialWeights
from dcnseg.engine.listener import EpochProgress, PartialEpoch, RunSummary, TrainingListener
from dcnseg.engine.loading import EpochBatches, TrainingLoader
from dcnseg.engine.loggers import WriteRecord, open_loggers
from dcnseg.engine.metrics import append_metrics, metrics_line
from dcnseg.engine.optim import balance_classes, build_loss, build_loss_weight
from dcnseg.engine.region_objective import build_region_objective
from dcnseg.engine.run_folder import TRAIN_BATCH, explain_write_errors
from dcnseg.engine.run_images import write_train_batch
from dcnseg.engine.safeguards import Safeguards
from dcnseg.engine.state import TrainingState, build_state, restore_random_states, seed_epoch
from dcnseg.engine.step import TrainingStep
from dcnseg.engine.training_data import TrainingData, training_dataset
from dcnseg.errors import TrainingError
from dcnseg.inference.predictor import Predictor


def is_evaluated(config: TrainConfig, epoch: int) -> bool:
    """Whether the network is evaluated after this epoch."""
    return epoch % config.eval_every == 0 or epoch == config.epochs


def stops_early(config: TrainConfig, epoch: int, best_epoch: int) -> bool:
    """Whether `patience` epochs have passed without improvement at an evaluation."""
    is_due = epoch > 0 and is_evaluated(config, epoch)
    return is_due and 0 < config.patience <= epoch - best_epoch


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
    """Trains a run epoch by epoch.

    A run can be killed and resumed at any time. The files of an epoch are written before the
    checkpoint that marks it as complete; a resumed run writes them again, with the same content.
    Of several processes, only the main one writes files.
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
        world: World = SINGLE,
    ) -> None:
        self.config = config
        self.run = run
        self.data = data
        self.listener = listener
        self.device = select_device(config.device)
        self.amp_dtype = select_amp_dtype(config.amp, self.device)
        self.world = world
        self.batches = EpochBatches(
            len(data.splits.train),
            config.batch_size,
            seed=config.seed,
            world=world,
            least=least_images(self.device),
        )
        self.state: TrainingState = build_state(
            config,
            num_classes=data.class_map.num_classes,
            updates_per_epoch=math.ceil(len(self.batches) / config.accumulate),
            device=self.device,
            encoder_weights=encoder_weights,
            initial=initial,
            world=world,
        )
        weights = balance_classes(data.pixel_counts, config.class_weights)
        weights = None if weights is None else weights.to(self.device)
        loss = build_loss(config.loss, weights)
        classes = data.class_map
        regions = build_region_objective(config, classes.object_indices, classes.num_classes)
        self.step = TrainingStep(
            self.state,
            loss,
            self.device,
            self.amp_dtype,
            regions,
            weigh=build_loss_weight(config.loss, weights),
            world=world,
        )
        self.dataset = training_dataset(config, data, self.state.preprocessing, augment)
        self.loader = TrainingLoader(
            self.dataset,
            self.batches,
            accumulate=config.accumulate,
            workers=config.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        self.evaluator = EpochEvaluator(config, run, data, self.state, self.device, listener, world)
        self.safeguards = Safeguards(config, run, self.state, self.step, listener, world)

    def run_epochs(self) -> TrainResult:
        """Train until the last epoch, or until the score stops improving."""
        self.listener.started(self._summary())
        if self.world.size > 1 and self.device.type == "cpu":
            self.listener.noted("Batch norm statistics are per process on the CPU.")
        if self.state.epoch == 0 and self.state.partial is None:
            self.safeguards.save()  # reports a full disk early, and allows a resume from the start
            if self.world.is_main:
                self._write_train_batch()
        with self._open_loggers() as write_record, self.loader.manage_workers():
            for epoch in range(self.state.epoch + 1, self.config.epochs + 1):
                record = self._run_epoch(epoch)
                write_record(record)
                self.listener.epoch_done(record, is_best=self.state.best_epoch == epoch)
                if self.should_stop_early():
                    self.listener.stopped_early(epoch, self.config.patience)
                    break
                if epoch < self.config.epochs:
                    self.safeguards.stop_if_requested()
        if not self.state.best_epoch and self.state.epoch:
            error = TrainingError(
                f"No epoch of {self.run} has a score: the network's output for a validation image "
                "was never finite. Start a new run with a lower --lr or a longer --warmup-epochs."
            )
            raise self.world.explain(error)
        return TrainResult(self.run, self.state.best_epoch, self.state.best_scores or {})

    def _open_loggers(self) -> AbstractContextManager[WriteRecord]:
        if self.world.is_main:
            return open_loggers(self.run, self.config, self.listener.warned)
        return nullcontext(lambda _record: None)

    def _write_train_batch(self) -> None:
        path, indices = self.run / TRAIN_BATCH, next(self.batches.whole_batches())
        self.dataset.set_epoch(1)
        with explain_write_errors(path):
            write_train_batch(path, self.dataset, indices, self.state.preprocessing)

    def _run_epoch(self, epoch: int) -> dict[str, Any]:
        """Train and evaluate an epoch, or the rest of it, and save the result."""
        started = time.perf_counter()
        partial = self._start_epoch(epoch)
        record: dict[str, Any] = {"epoch": epoch, "lr": partial.lr}
        record |= self._train_epoch(epoch, partial)
        if is_evaluated(self.config, epoch):
            record |= self.evaluator.evaluate(epoch, self.safeguards.stop_if_requested)
        record["seconds"] = round(time.perf_counter() - started, 2)
        self._finish_epoch(epoch, record)
        return record

    def _train_epoch(self, epoch: int, partial: PartialEpoch) -> dict[str, Any]:
        """Train on the remaining batches of an epoch; return the mean loss and the speed."""
        progress = EpochProgress(
            partial,
            epoch=epoch,
            epochs=self.config.epochs,
            num_images=len(self.data.splits.train),
            listener=self.listener,
        )

        def batch_done(_own_images: int, loss: float) -> None:
            progress.batch_done(self.batches.size_of(partial.step), loss)

        self.state.model.train()
        with explain_training_out_of_memory(self.config, self.device):
            for group in self.loader.groups(epoch, start=partial.step):
                outcome = self.step(group, batch_done)
                self.safeguards.after_step(outcome)
        record: dict[str, Any] = {
            "loss": None if math.isnan(partial.mean_loss) else partial.mean_loss,
            "images_per_second": progress.images_per_second,
        }
        skipped = {"skipped_steps": partial.skipped, "amp_skipped_steps": partial.amp_skipped}
        return record | {name: count for name, count in skipped.items() if count}

    def _start_epoch(self, epoch: int) -> PartialEpoch:
        """Seed a new epoch, or restore the random states of a partial one.

        The states of other processes are restored if their number is the same as before.
        """
        state, rank = self.state, self.world.rank
        saved = [state.random, *state.other_random]
        own = saved[rank] if rank == 0 or len(saved) == self.world.size else None
        if state.partial is None or (rank and own is None):
            seed_epoch(self.config.seed, epoch, rank)
        elif own is not None:
            restore_random_states(own)
        state.partial = state.partial or PartialEpoch(lr=float(state.schedule.get_last_lr()[0]))
        state.random, state.other_random = None, ()
        return state.partial

    def _finish_epoch(self, epoch: int, record: Mapping[str, Any]) -> None:
        self.state.epoch = epoch
        self.state.partial = None
        if self.world.is_main:
            append_metrics(self.run, record)
        self.state.metrics += metrics_line(record)
        is_final = epoch == self.config.epochs
        if is_final or epoch % self.config.checkpoint_epochs == 0:
            self.safeguards.save(is_final=is_final)  # last: everything else is on disk

    def should_stop_early(self) -> bool:
        """Whether the run stops at its current epoch; see `stops_early`."""
        return stops_early(self.config, self.state.epoch, self.state.best_epoch)

    def _summary(self) -> RunSummary:
        splits, model = self.data.splits, self.state.model
        return RunSummary(
            run=self.run,
            splits={"train": len(splits.train), "val": len(splits.val), "test": len(splits.test)},
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
            num_processes=self.world.size,
        )
