"""Training on a folder of images and masks; entry points `train` and `resume`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from dcnseg.checkpoint import RESUME_STATE, load_resume_state
from dcnseg.config import (
    RESUMABLE_SETTINGS,
    UNCOMPARED_SETTINGS,
    TrainConfig,
    flatten_settings,
    from_dict,
    unflatten_settings,
)
from dcnseg.data.transforms import Augmentation, name_of
from dcnseg.device import select_amp_dtype, select_device
from dcnseg.engine.batch_size import find_batch_size
from dcnseg.engine.distributed import (
    World,
    join_world,
    least_images,
    require_shareable_batch,
)
from dcnseg.engine.environment import restore_environment
from dcnseg.engine.initial_weights import InitialWeights, read_initial_weights
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.loggers import require_loggers
from dcnseg.engine.metrics import restore_metrics
from dcnseg.engine.out_folder import (
    LOCK,
    check_is_unlocked,
    check_out_is_separate,
    check_run_is_free,
    lock_run,
)
from dcnseg.engine.run_folder import (
    CLASSES,
    check_classes_are_unchanged,
    check_split_is_unchanged,
    create_run,
    is_run,
    read_run,
    remove_temporary_files,
    update_settings,
)
from dcnseg.engine.saved_state import restore_state
from dcnseg.engine.trainer import Trainer, TrainResult, stops_early
from dcnseg.engine.training_data import (
    FILES,
    TrainingData,
    check_files_are_unchanged,
    find_training_splits,
    prepare_data,
)
from dcnseg.errors import ConfigError
from dcnseg.files import mark_output_folder
from dcnseg.models.pretrained import NO_WEIGHTS, require_encoder_weights
from dcnseg.models.segmenter import build_segmenter
from dcnseg.processes import Process

MIN_MAP_CELLS: Final = 24  # of each side; see docs/comparing.md


def train(
    config: TrainConfig,
    run: Path,
    *,
    sources: Mapping[str, str] | None = None,
    overwrite: bool = False,
    has_auto_batch: bool = False,
    augment: Augmentation | None = None,
    listener: TrainingListener | None = None,
) -> TrainResult:
    """Train a network and write a run folder, as `dcnseg.train` does.

    `sources` has the source of each setting, for config.json. With `has_auto_batch`, the largest
    batch size that fits into memory is used instead of that of `config`.

    Processes that torchrun has started share the run. If it has restarted them, the run that they
    left is resumed.

    Raises:
        ConfigError: a setting is not supported on this machine, or the folder is not empty.
        DataError: an image or mask is invalid; the message names the file.
        TrainingError: the loss stays non-finite, memory runs out, or a data loading worker dies.
        TrainingStoppedError: the listener requested a stop; a checkpoint is saved.
    """
    listener = listener or TrainingListener()
    with join_world() as world, ExitStack() as stack:
        world.claim_device(config.device)
        is_left = world.on_main(lambda: _is_left_by_restart(run, world.process))
        if is_left and world.on_main(lambda: (run / RESUME_STATE).is_file()):
            listener.noted(f"torchrun has restarted the processes; {run} is resumed.")
            finished = world.on_main(lambda: _find_result(run))
            return finished or _resume(run, {}, augment, listener, world)
        overwrite = overwrite or is_left
        prepared = world.on_main(
            lambda: _prepare(config, run, overwrite, has_auto_batch, augment, listener, world)
        )
        trainer = prepared.make_trainer(run, listener, augment, world)

        def start() -> None:
            check_run_is_free(run, overwrite=overwrite)  # again: reading data may take minutes
            stack.enter_context(lock_run(run, listener.warned))
            data = prepared.data
            create_run(run, prepared.config, sources or {}, data.class_map, data.splits)

        world.on_main(start)
        return trainer.run_epochs()


@dataclass(frozen=True)
class _Prepared:
    """What the main process has found out before training, or loaded to resume."""

    config: TrainConfig
    data: TrainingData
    encoder_weights: str
    initial: InitialWeights | None = None
    saved: Mapping[str, Any] = field(default_factory=dict)

    def make_trainer(
        self,
        run: Path,
        listener: TrainingListener,
        augment: Augmentation | None,
        world: World,
    ) -> Trainer:
        """Build the network and what trains it, in every process."""
        return Trainer(
            self.config,
            run,
            self.data,
            listener,
            encoder_weights=self.encoder_weights,
            initial=self.initial,
            augment=augment,
            world=world,
        )


def _prepare(
    config: TrainConfig,
    run: Path,
    overwrite: bool,
    has_auto_batch: bool,
    augment: Augmentation | None,
    listener: TrainingListener,
    world: World,
) -> _Prepared:
    check_out_is_separate(run, config.data.root)
    splits = find_training_splits(config)
    check_out_is_separate(run, config.data.root, splits)
    check_run_is_free(run, overwrite=overwrite)
    check_is_unlocked(run)
    # Fail early: reading the masks may take minutes.
    device = select_device(config.device)
    select_amp_dtype(config.amp, device)
    _check_batch_size(config, has_auto_batch, world, device)
    build_segmenter(config.model, num_classes=2)
    initial = None
    if config.init is None:
        require_encoder_weights(config.model.encoder, config.encoder_weights)
    else:
        initial = read_initial_weights(config.init, config.model)
        config = replace(config, init=config.init.resolve(), encoder_weights=NO_WEIGHTS)
    config = replace(config, augment=name_of(augment) if augment else "")
    require_loggers(config)
    _note_small_map(config, listener)
    data = prepare_data(config, splits, on_progress=listener.checking, on_warning=listener.warned)
    if has_auto_batch:
        size = find_batch_size(
            config, num_classes=data.class_map.num_classes, num_images=len(data.splits.train)
        )
        config = replace(config, batch_size=size)
    if initial:
        initial = initial.for_classes(data.class_map)
        initial.report(build_segmenter(config.model, data.class_map.num_classes), config, listener)
    return _Prepared(config, data, config.encoder_weights, initial)


def _check_batch_size(
    config: TrainConfig, has_auto_batch: bool, world: World, device: torch.device
) -> None:
    if has_auto_batch and world.size > 1:
        raise ConfigError(
            f"--batch-size is auto, which is for one process; there are {world.size}. Pass the "
            "number of images of all processes together."
        )
    require_shareable_batch(config.batch_size, world.size, least_images(device))


def resume(
    run: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    augment: Augmentation | None = None,
    listener: TrainingListener | None = None,
) -> TrainResult:
    """Resume a run from its last checkpoint; the result is that of an uninterrupted run.

    `changes` are settings from `RESUMABLE_SETTINGS`, by dotted names ("data.workers"); `epochs` is
    short for "epochs" among them. The learning rate follows the new schedule.

    Raises:
        ConfigError: the run is complete, or a setting has changed that must not.
        CheckpointError: the folder has no run to resume, or its files are damaged.
        DataError: the data has changed since the run started.
        TrainingError: see `train`.
        TrainingStoppedError: see `train`.
    """
    listener = listener or TrainingListener()
    changes = dict(changes or {}) | ({} if epochs is None else {"epochs": epochs})
    with join_world() as world:
        return _resume(run, changes, augment, listener, world)


def is_complete(run: Path) -> bool:
    """Whether a run has trained all its epochs, or stopped early.

    Raises:
        CheckpointError: the folder has no run to resume, or its files are damaged.
    """
    config, saved = read_run(run).config, load_resume_state(run / RESUME_STATE)
    stops = stops_early(config, saved["epoch"], saved["best_epoch"])
    return bool(saved["epoch"] >= config.epochs or stops)


def _is_left_by_restart(run: Path, process: Process) -> bool:
    """Whether torchrun has restarted the processes, and the folder is what they left."""
    if not process.restarts or not run.is_dir():
        return False
    if is_run(run):
        record = read_run(run)
        return bool(process.job) and (record.job, record.command) == (process.job, sys.argv)
    return {path.name for path in run.iterdir()} <= {LOCK, CLASSES, FILES}


def _find_result(run: Path) -> TrainResult | None:
    """The result of a run; None if it is not complete."""
    if not is_complete(run):
        return None
    saved = load_resume_state(run / RESUME_STATE)
    return TrainResult(run, saved["best_epoch"], saved["best_scores"] or {})


def _resume(
    run: Path,
    changes: Mapping[str, Any],
    augment: Augmentation | None,
    listener: TrainingListener,
    world: World,
) -> TrainResult:
    with ExitStack() as stack:

        def load() -> _Prepared:
            read_run(run)  # before anything is written: the folder may not be a run
            stack.enter_context(lock_run(run, listener.warned))
            return _load(run, changes, augment, listener, world)

        prepared = world.on_main(load)
        config, saved = prepared.config, prepared.saved
        world.claim_device(config.device)
        device = select_device(config.device)
        amp_dtype = select_amp_dtype(config.amp, device)
        stack.enter_context(restore_environment(saved, device, amp_dtype, listener.warned))
        trainer = prepared.make_trainer(run, listener, augment, world)
        restore_state(trainer.state, saved, run / RESUME_STATE)
        if trainer.should_stop_early():
            error = ConfigError(
                f"{run} is complete: it stopped at epoch {saved['epoch']}, after {config.patience} "
                "epochs without improvement. To continue training, increase --patience, or set it "
                "to 0 to disable early stopping."
            )
            raise world.explain(error)

        def restore_files() -> str:
            remove_temporary_files(run)
            mark_output_folder(run)
            update_settings(run, config, list(changes))
            return restore_metrics(run, saved["epoch"], saved.get("metrics"), listener.warned)

        trainer.state.metrics = world.on_main(restore_files)
        return trainer.run_epochs()


def _load(
    run: Path,
    changes: Mapping[str, Any],
    augment: Augmentation | None,
    listener: TrainingListener,
    world: World,
) -> _Prepared:
    """Read a run and its data, and check that they are unchanged."""
    record = read_run(run)
    saved = load_resume_state(run / RESUME_STATE)
    _check_settings_are_unchanged(run, record.config, saved)
    config = _with_changes(record.config, changes)
    _check_augmentation(run, config.augment, augment)
    if saved["epoch"] >= config.epochs:
        raise ConfigError(
            f"{run} is complete: {saved['epoch']} of {config.epochs} epochs are done. "
            f"To continue training, set --epochs to more than {saved['epoch']}."
        )
    splits = find_training_splits(config)
    check_split_is_unchanged(record, splits)
    check_files_are_unchanged(run, splits)
    data = prepare_data(config, splits, on_progress=listener.checking, on_warning=listener.warned)
    check_classes_are_unchanged(record, data.class_map)
    least = least_images(select_device(config.device))
    require_shareable_batch(config.batch_size, world.size, least)
    return _Prepared(config, data, NO_WEIGHTS, saved=saved)


def _note_small_map(config: TrainConfig, listener: TrainingListener) -> None:
    """Note that the offsets have little room on the feature map of a training crop."""
    rows, columns = (side // config.model.output_stride for side in config.data.crop_size)
    if config.model.deform_layers and min(rows, columns) < MIN_MAP_CELLS:
        listener.noted(
            f"The last feature map of a training crop has {rows}x{columns} cells. Offsets have "
            f"little to adapt to below {MIN_MAP_CELLS}x{MIN_MAP_CELLS}; a larger --crop-size, or "
            "--output-stride 8, gives them more. `dcnseg compare` shows whether they help."
        )


def _check_augmentation(run: Path, before: str, augment: Augmentation | None) -> None:
    """Raise a ConfigError unless the augmentation is the one that the run started with."""
    now = name_of(augment) if augment else ""
    if before and now != before:
        raise ConfigError(
            f"{run} was trained with the augmentation {before}, but `augment` is {now or 'None'}. "
            "Resume it from Python with the same one: resume(run, augment=...)."
        )
    if now and not before:
        raise ConfigError(
            f"{run} was trained without a custom augmentation; `augment` must be None."
        )


def _with_changes(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    refused = sorted(set(changes) - set(RESUMABLE_SETTINGS))
    if refused:
        raise ConfigError(
            f"{', '.join(refused)} cannot be changed when a run is resumed; only "
            f"{', '.join(RESUMABLE_SETTINGS)} can."
        )
    return unflatten_settings({**flatten_settings(config), **changes})


def _check_settings_are_unchanged(run: Path, config: TrainConfig, saved: Mapping[str, Any]) -> None:
    """Raise a ConfigError if config.json differs from the settings in the checkpoint."""
    if not saved.get("settings"):
        return
    now = flatten_settings(config)
    before = flatten_settings(from_dict(TrainConfig, saved["settings"]))
    different = [
        f"{name} is {now[name]}, was {before[name]}"
        for name in before
        if now[name] != before[name] and name not in (*RESUMABLE_SETTINGS, *UNCOMPARED_SETTINGS)
    ]
    if different:
        raise ConfigError(
            f"{run}: the settings in config.json have changed since the run was stopped: "
            f"{'; '.join(different)}. Restore them, or start a new run."
        )
