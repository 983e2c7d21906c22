"""The training step of `dcnseg train` for a DeepLabV3+, plain and with deformable layers.

Entry point: `time_steps`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Call, alternate
from benchmarks.gpu_timing import kernel_shares, peak_memory
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
    """The size of a batch, and the number of steps in a turn and in a profile."""

    size: int = 16
    size_hw: tuple[int, int] = (360, 480)
    steps: int = 4
    profiled_steps: int = 2


def time_steps(
    device: torch.device, rounds: int, batch: Batch, encoder: str = "resnet50"
) -> dict[str, Any]:
    """Return time, images per second, peak memory and longest kernels of each model's step."""
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
                "kernels": kernel_shares(steps[name], device, calls=batch.profiled_steps)[:12],
            }
            for name, timing in timings.items()
        },
    }


def make_step(model: ModelConfig, device: torch.device, batch: Batch) -> Call:
    """Return an update of all weights from a batch of noise, with bfloat16 autocast on a GPU.

    Offsets are not zero, as in a trained network; zero offsets would sample whole pixels only.
    """
    amp = "bf16" if device.type == "cuda" else "off"  # bfloat16 is slow on many CPUs
    config = TrainConfig(
        DataConfig(Path()), model, encoder_weights="none", amp=amp, device=str(device)
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


def _wall_clock(step: Call, device: torch.device, steps: int) -> float:
    """Return the milliseconds of a step, with the time in which the GPU waits for Python."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started) / steps
