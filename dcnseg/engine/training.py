"""Training of a segmenter on a folder of images and masks; entry points `train` and `resume`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from dcnseg.engine.batch_size import fitting_batch
from dcnseg.engine.environment import computes_as_before
from dcnseg.engine.event_writer import require_tensorboard
from dcnseg.engine.fingerprint import check_files_are_unchanged
from dcnseg.engine.initial_weights import read_initial_weights
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.run_folder import (
    METRICS,
    check_classes_are_unchanged,
    check_out_is_separate,
    check_run_is_free,
    check_split_is_unchanged,
    create_run,
    drop_unfinished_files,
    read_run,
    restore_metrics,
    update_settings,
)
from dcnseg.engine.run_lock import check_is_unlocked, lock_run
from dcnseg.engine.state import TrainingState, restore_state
from dcnseg.engine.trainer import Trainer, TrainResult
from dcnseg.engine.training_data import find_training_splits, prepare_data
from dcnseg.errors import ConfigError
from dcnseg.files import mark_output_folder
from dcnseg.models.pretrained import NO_WEIGHTS, require_encoder_weights
from dcnseg.models.segmenter import build_segmenter


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
    """Train a network and write a run folder.

    Args:
        config: All settings.
        run: The run folder; new, empty, or to be overwritten.
        sources: Where each setting came from, kept in config.json.
        overwrite: Whether the files of a former run in the folder may be replaced.
        has_auto_batch: Train with as many images per batch as memory holds, whatever `config`
            says of it.
        augment: Called with every training image and its label map before the random crop, see
            `CustomAugmentation`; its random numbers are seeded for each of them.
        listener: Told what happens.

    Raises:
        ConfigError: a setting cannot be met, or the folder is not empty.
        DataError: an image or mask is wrong; the message names it.
        TrainingError: the loss stays not finite, memory runs out, a loading process dies.
        TrainingStoppedError: the listener asked to stop; the state is saved.
    """
    listener = listener or TrainingListener()
    check_out_is_separate(run, config.data.root)
    splits = find_training_splits(config)
    check_out_is_separate(run, config.data.root, splits)
    check_run_is_free(run, overwrite=overwrite)
    check_is_unlocked(run)
    # A setting that cannot be met is told before the masks are read, which may take minutes.
    select_amp_dtype(config.amp, select_device(config.device))
    build_segmenter(config.model, num_classes=2)
    initial = None
    if config.init is None:
        require_encoder_weights(config.model.encoder, config.encoder_weights)
    else:
        initial = read_initial_weights(config.init, config.model)
        config = replace(config, init=config.init.resolve(), encoder_weights=NO_WEIGHTS)
    config = replace(config, augment=name_of(augment) if augment else "")
    if config.tensorboard:
        require_tensorboard()
    data = prepare_data(config, splits, on_progress=listener.checking, on_warning=listener.warned)
    if has_auto_batch:
        num_classes = data.class_map.num_classes
        config = replace(
            config,
            batch_size=fitting_batch(
                config, num_classes=num_classes, num_images=len(data.splits.train)
            ),
        )
    if initial:
        initial = initial.for_classes(data.class_map)
        initial.report(build_segmenter(config.model, data.class_map.num_classes), config, listener)
    trainer = Trainer(
        config,
        run,
        data,
        listener,
        encoder_weights=config.encoder_weights,
        initial=initial,
        augment=augment,
    )
    check_run_is_free(run, overwrite=overwrite)  # again: reading the data may have taken minutes
    with lock_run(run, listener.warned):
        create_run(run, config, sources or {}, data.class_map, data.splits)
        return trainer.run_epochs()


def resume(
    run: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    augment: Augmentation | None = None,
    listener: TrainingListener | None = None,
) -> TrainResult:
    """Go on with a run from its last saved state, as if it had never stopped.

    Args:
        run: A run folder.
        changes: Settings to change, named as in `RESUMABLE_SETTINGS` ("data.workers").
        epochs: The same as "epochs" in `changes`; the learning rate follows the new schedule.
        augment: What `train` was given.
        listener: Told what happens.

    Raises:
        ConfigError: all epochs are done, or a setting has changed that must not.
        CheckpointError: the folder holds nothing to resume, or its files are damaged.
        DataError: the data has changed since the run began.
        TrainingError: see `train`.
        TrainingStoppedError: see `train`.
    """
    listener = listener or TrainingListener()
    changes = dict(changes or {}) | ({} if epochs is None else {"epochs": epochs})
    read_run(run)  # first, since nothing is written to a folder without a run
    with lock_run(run, listener.warned):
        return _resume_locked(run, changes, augment, listener)


def _resume_locked(
    run: Path,
    changes: Mapping[str, Any],
    augment: Augmentation | None,
    listener: TrainingListener,
) -> TrainResult:
    record = read_run(run)
    saved = load_resume_state(run / RESUME_STATE)
    _check_settings_are_unchanged(run, record.config, saved)
    config = _with_changes(record.config, changes)
    _check_augmentation(run, config.augment, augment)
    if saved["epoch"] >= config.epochs:
        raise ConfigError(
            f"{run} is complete: {saved['epoch']} of {config.epochs} epochs are done. "
            f"To train on, give more --epochs than {saved['epoch']}."
        )
    splits = find_training_splits(config)
    check_split_is_unchanged(record, splits)
    check_files_are_unchanged(run, splits)
    data = prepare_data(config, splits, on_progress=listener.checking, on_warning=listener.warned)
    check_classes_are_unchanged(record, data.class_map)
    device = select_device(config.device)
    amp_dtype = select_amp_dtype(config.amp, device)
    with computes_as_before(saved, device, amp_dtype, listener.warned):
        trainer = Trainer(config, run, data, listener, encoder_weights=NO_WEIGHTS, augment=augment)
        restore_state(trainer.state, saved, run / RESUME_STATE)
        if trainer.should_stop_early():
            raise ConfigError(
                f"{run} is complete: it stopped at epoch {saved['epoch']}, after {config.patience} "
                "epochs without a better score. To train on, give more --patience, or 0 for no end."
            )
        drop_unfinished_files(run)
        mark_output_folder(run)
        update_settings(run, config, list(changes))
        _restore_metrics(trainer.state, run, saved, listener)
        return trainer.run_epochs()


def _restore_metrics(
    state: TrainingState, run: Path, saved: Mapping[str, Any], listener: TrainingListener
) -> None:
    state.metrics, missing = restore_metrics(run, state.epoch, saved.get("metrics"))
    if missing:
        listener.warned(
            f"{run / METRICS} has no line of {len(missing)} of the epochs up to {state.epoch}, "
            f"epoch {missing[0]} for one, and the resume state does not hold them either."
        )


def _check_augmentation(run: Path, before: str, augment: Augmentation | None) -> None:
    """Raise a ConfigError unless the run goes on with the augmentation that it began with."""
    now = name_of(augment) if augment else ""
    if before and now != before:
        raise ConfigError(
            f"{run} was trained with the augmentation {before}; {now or 'none'} is given now. "
            "Resume it from Python with the same one: resume(run, augment=...)."
        )
    if now and not before:
        raise ConfigError(f"{run} was trained without an augmentation of your own; leave it out.")


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
