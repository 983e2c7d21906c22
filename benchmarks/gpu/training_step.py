"""The training step of a DeepLabV3+ as `dcnseg train` makes it, plain and with deformable layers.

Entry point: `time_steps`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate
from benchmarks.gpu.timing import kernel_shares, peak_memory
from dcnseg.config import DataConfig, ModelConfig, TrainConfig
from dcnseg.device import select_amp_dtype
from dcnseg.engine.loading import BatchGroup
from dcnseg.engine.optim import build_loss
from dcnseg.engine.state import build_state
from dcnseg.engine.step import TrainingStep

PLAIN = "plain"
MODELS = {
    PLAIN: ModelConfig(deform_layers=0),
    "deformable v1": ModelConfig(deform_layers=3),
    "deformable v2": ModelConfig(deform_layers=3, modulated=True),
}
NUM_CLASSES = 11


@dataclass(frozen=True)
class Batch:
    """What a step is given, and how often."""

    size: int = 16
    size_hw: tuple[int, int] = (360, 480)
    steps: int = 4  # in a turn


def time_steps(
    device: torch.device, rounds: int, batch: Batch, encoder: str = "resnet50"
) -> dict[str, Any]:
    """Milliseconds, images per second, memory and longest kernels of each model's step."""
    steps = {
        name: make_step(ModelConfig(**{**vars(model), "encoder": encoder}), device, batch)
        for name, model in MODELS.items()
    }
    timings = alternate(steps, rounds, lambda step: _wall_clock(step, device, batch.steps))
    plain = timings[PLAIN]
    return {
        "encoder": encoder,
        "batch": [batch.size, *batch.size_hw],
        "models": {
            name: {
                "milliseconds": timing.median,
                "spread": timing.spread,
                "ratio": timing.ratio_to(plain),
                "images_per_second": 1e3 * batch.size / timing.median,
                "peak_mib": peak_memory(steps[name], device),
                "kernels": kernel_shares(steps[name], device, calls=2)[:12],
            }
            for name, timing in timings.items()
        },
    }


def make_step(model: ModelConfig, device: torch.device, batch: Batch) -> Callable[[], None]:
    """An update of all weights from one batch of noise, with bfloat16 autocast.

    Offsets that are zero sample whole pixels; those of a trained network do not, nor do these.
    """
    config = TrainConfig(
        DataConfig(Path()), model, encoder_weights="none", amp="bf16", device=str(device)
    )
    state = build_state(
        config,
        num_classes=NUM_CLASSES,
        updates_per_epoch=1000,
        device=device,
        encoder_weights="none",
    )
    for layer in state.model.deformable_layers().values():
        torch.nn.init.normal_(layer.conv_offset.weight, std=0.01)
    state.model.train()
    amp_dtype = select_amp_dtype(config.amp, device)
    training_step = TrainingStep(state, build_loss("ce", None), device, amp_dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch.size, 3, *batch.size_hw, generator=generator).to(device)
    labels = torch.randint(NUM_CLASSES, (batch.size, *batch.size_hw), generator=generator)
    labels = labels.to(device)

    def step() -> None:
        training_step(BatchGroup(1, [(images, labels)]))

    return step


def _wall_clock(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Milliseconds of a step, the program's own waiting and all."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started) / steps
