"""The state of a training run, and the random number generators.

Entry points: `build_state`, `seed_epoch`, `random_states`, `restore_random_states`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from dcnseg.config import Preprocessing, TrainConfig, to_dict
from dcnseg.device import select_amp_dtype
from dcnseg.engine.distributed import SINGLE, World
from dcnseg.engine.environment import describe_environment
from dcnseg.engine.initial_weights import InitialWeights
from dcnseg.engine.listener import PartialEpoch
from dcnseg.engine.optim import build_optimizer, build_schedule
from dcnseg.models.pretrained import load_encoder_weights
from dcnseg.models.segmenter import Segmenter, build_segmenter

RANK_STRIDE: Final = 10**15  # between the seeds of two processes


@dataclass
class TrainingState:
    """Everything that changes during training, or is saved with it."""

    model: Segmenter
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    preprocessing: Preprocessing
    epoch: int = 0  # the last complete one
    best_epoch: int = 0
    best_scores: Mapping[str, Any] | None = None
    partial: PartialEpoch | None = None  # progress of the next epoch
    random: Mapping[str, Any] | None = None  # generator states to restore in a partial epoch
    other_random: Sequence[Mapping[str, Any]] = ()  # those of the processes from rank 1
    skipped_in_a_row: int = 0  # steps
    settings: Mapping[str, Any] = field(default_factory=dict)  # as plain values
    environment: Mapping[str, Any] = field(default_factory=dict)  # see `describe_environment`
    metrics: str = ""  # the text of metrics.jsonl up to `epoch`

    @property
    def best_mean_iou(self) -> float:
        """Mean IoU of the best epoch; 0 if it is undefined or no epoch was evaluated."""
        return (self.best_scores or {}).get("mean_iou") or 0.0

    @property
    def evaluated_model(self) -> Segmenter:
        """The model with averaged weights if there is one."""
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
    world: World = SINGLE,
) -> TrainingState:
    """Build the network (from `initial` or `encoder_weights`), optimizer and schedule."""
    torch.manual_seed(config.seed)
    model = build_segmenter(config.model, num_classes)
    if initial is None:
        preprocessing = load_encoder_weights(model.encoder, config.model.encoder, encoder_weights)
    else:
        preprocessing = initial.load_into(model)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = world.synchronize_batch_norm(model)
    optimizer = build_optimizer(
        model,
        config.optimizer,
        lr=config.lr,
        offset_lr=config.offset_lr,
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
        average=build_average(model, config.ema) if config.ema else None,
        optimizer=optimizer,
        schedule=schedule,
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16),
        preprocessing=replace(preprocessing, input_scale=config.data.input_scale),
        settings=to_dict(config),
        environment=describe_environment(device, amp_dtype),
    )


def build_average(model: Segmenter, decay: float) -> AveragedModel:
    """Build an exponential moving average whose decay grows to `decay` during the first steps."""

    def update(averages: Any, currents: Any, num_averaged: Any) -> None:
        count = int(num_averaged)
        weight = 1 - min(decay, (1 + count) / (10 + count))
        # AveragedModel groups tensors by dtype and device, so one kernel updates many.
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, weight)
        else:
            torch._foreach_copy_(averages, currents)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Seed all generators, so that an epoch does not depend on earlier ones.

    Processes that share a run have different random numbers, for example in dropout.
    """
    number = seed * 1_000_003 + epoch + rank * RANK_STRIDE
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def random_states() -> dict[str, Any]:
    """Return the generator states of Python, NumPy and torch as tensors and plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Restore the result of `random_states`; GPU states only if the number of GPUs is the same."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
