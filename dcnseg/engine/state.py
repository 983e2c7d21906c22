"""The state of a running training: network, optimizer, schedule, and what the best epoch was.

Entry points: `build_state`, `restore_state`, `save_state`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from dcnseg.checkpoint import save_resume_state
from dcnseg.config import MAX_COUNT, Preprocessing, TrainConfig, from_dict, to_dict
from dcnseg.device import select_amp_dtype
from dcnseg.engine.environment import ENVIRONMENT, describe_environment
from dcnseg.engine.initial_weights import InitialWeights
from dcnseg.engine.optim import build_optimizer, build_schedule
from dcnseg.engine.progress import PartialEpoch
from dcnseg.engine.random_states import random_states, restore_random_states
from dcnseg.engine.saved_values import (
    like_optimizer,
    like_schedule,
    require_like,
    require_random_states,
)
from dcnseg.errors import CheckpointError, short_repr
from dcnseg.models.pretrained import load_encoder_weights
from dcnseg.models.segmenter import Segmenter, build_segmenter
from dcnseg.safe_load import check_finite, summarize_error
from dcnseg.validation import require


@dataclass
class TrainingState:
    """Everything that changes while training.

    Attributes:
        epoch: The last one that is complete.
        so_far: What has been done of the next one, if it has begun.
        random: The generators' states to go on with in its middle; None once that was done.
        skipped_in_a_row: Last updates that were skipped, without one between that was not.
        settings: The run's, as plain values.
        environment: What the last digits depend on besides, see `describe_environment`.
        metrics: The text of metrics.jsonl up to `epoch`, so that the file can be written again.
    """

    model: Segmenter
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    preprocessing: Preprocessing
    epoch: int = 0
    best_epoch: int = 0
    best_scores: Mapping[str, Any] | None = None
    so_far: PartialEpoch | None = None
    random: Mapping[str, Any] | None = None
    skipped_in_a_row: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: str = ""

    @property
    def best_mean_iou(self) -> float:
        """Mean IoU of the best epoch; 0 where it has no meaning or no epoch was scored."""
        return (self.best_scores or {}).get("mean_iou") or 0.0

    @property
    def evaluated_model(self) -> Segmenter:
        """The averaged weights where there are any."""
        model = self.average.module if self.average is not None else self.model
        assert isinstance(model, Segmenter)
        return model


def build_state(
    config: TrainConfig,
    *,
    num_classes: int,
    updates_per_epoch: int,
    device: torch.device,
    encoder_weights: str,
    initial: InitialWeights | None = None,
) -> TrainingState:
    """The network, optimizer and schedule at the start of a run, drawn from the seed.

    Args:
        config: All settings.
        num_classes: K.
        updates_per_epoch: Steps of the optimizer in an epoch.
        device: Where to compute.
        encoder_weights: As `load_encoder_weights` takes them.
        initial: Loaded instead of `encoder_weights`, decoder included.
    """
    torch.manual_seed(config.seed)
    model = build_segmenter(config.model, num_classes)
    if initial is None:
        preprocessing = load_encoder_weights(model.encoder, config.model.encoder, encoder_weights)
    else:
        preprocessing = initial.load_into(model)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(
        model,
        config.optimizer,
        lr=config.lr,
        offset_lr_scale=config.offset_lr_scale,
        weight_decay=config.weight_decay,
    )
    schedule = build_schedule(
        optimizer,
        total_steps=updates_per_epoch * config.epochs,
        warmup_steps=round(updates_per_epoch * config.warmup_epochs),
        power=config.poly_power,
    )
    amp_dtype = select_amp_dtype(config.amp, device)
    return TrainingState(
        model=model,
        average=_averaged(model, config.ema) if config.ema else None,
        optimizer=optimizer,
        schedule=schedule,
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16),
        preprocessing=replace(preprocessing, input_scale=config.data.input_scale),
        settings=to_dict(config),
        environment=describe_environment(device, amp_dtype),
    )


def restore_state(state: TrainingState, saved: Mapping[str, Any], path: Path) -> None:
    """Put a resume state back into the objects of a fresh state.

    Args:
        state: The fresh state; after an error it is of no use.
        saved: What `load_resume_state` read.
        path: From where, for the message.

    Raises:
        CheckpointError: the resume state is of another network, or damaged.
    """
    try:
        _restore(state, saved)
    # Any exception: torch's objects refuse in their own ways.
    except Exception as error:
        raise CheckpointError(
            f"{path} does not fit the run's settings: {summarize_error(error)}"
        ) from error


def _restore(state: TrainingState, saved: Mapping[str, Any]) -> None:
    for name in ("model", "optimizer", "schedule", "scaler", "preprocessing", "best_scores"):
        require(name in saved, f"it lacks {name}")
    _load_tensors(state.model, saved["model"], "model")
    if state.average is not None:
        _load_tensors(state.average, saved.get("average"), "average")
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    state.optimizer.load_state_dict(
        like_optimizer(
            saved["optimizer"], state.optimizer.state_dict(), [p.shape for p in parameters]
        )
    )
    check_finite(dict(state.model.named_parameters()), "its model")
    for values in state.optimizer.state.values():
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        check_finite(tensors, "its optimizer")
    state.schedule.load_state_dict(like_schedule(saved["schedule"], state.schedule.state_dict()))
    if saved["scaler"]:  # empty where the run was not in float16 before
        require_like(saved["scaler"], state.scaler.state_dict(), "scaler")
        state.scaler.load_state_dict(saved["scaler"])
    state.preprocessing = from_dict(Preprocessing, saved["preprocessing"])
    state.epoch = saved["epoch"]
    state.best_epoch = saved.get("best_epoch", 0)
    state.best_scores = saved["best_scores"]
    # A state that lacks the rest was written at the end of an epoch.
    so_far = saved.get("so_far")
    state.so_far = None if so_far is None else _epoch_so_far(so_far)
    state.random = saved.get("random")
    if state.random is not None:
        require_random_states(state.random)
        restore_random_states(state.random)  # here, where it may still be refused
    state.skipped_in_a_row = saved.get("skipped_in_a_row", 0)


def _load_tensors(module: nn.Module, saved: Any, name: str) -> None:
    require_like(saved, module.state_dict(), name)
    module.load_state_dict(saved)


def _epoch_so_far(saved: Any) -> PartialEpoch:
    so_far = from_dict(PartialEpoch, saved)
    for name, value in asdict(so_far).items():
        most = math.inf if name == "loss_sum" else MAX_COUNT
        require(0 <= value <= most, f"so_far.{name} is {short_repr(value)}; expected 0 to {most}.")
    return so_far


def save_state(path: Path, state: TrainingState) -> None:
    """Write what `restore_state` reads; the file appears whole or not at all."""
    save_resume_state(
        path,
        {
            "model": state.model.state_dict(),
            "average": None if state.average is None else state.average.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "schedule": state.schedule.state_dict(),
            "scaler": state.scaler.state_dict(),
            "preprocessing": asdict(state.preprocessing),
            "epoch": state.epoch,
            "best_epoch": state.best_epoch,
            "best_scores": state.best_scores,
            "so_far": None if state.so_far is None else asdict(state.so_far),
            "random": random_states(),
            "skipped_in_a_row": state.skipped_in_a_row,
            "settings": state.settings,
            ENVIRONMENT: dict(state.environment),
            "metrics": state.metrics,
        },
    )


def _averaged(model: Segmenter, decay: float) -> AveragedModel:
    """An exponential moving average whose decay grows to `decay`, so that it follows at first."""

    def update(averages: Any, currents: Any, num_averaged: Any) -> None:
        count = int(num_averaged)
        weight = 1 - min(decay, (1 + count) / (10 + count))
        # Of one dtype and device, as AveragedModel groups them: one kernel for many tensors.
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, weight)
        else:
            torch._foreach_copy_(averages, currents)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
