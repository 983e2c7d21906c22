"""Optimizer, parameter groups and learning-rate schedule.

Entry points: `build_optimizer`, `build_schedule`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dcnseg.ops import OFFSET_BRANCHES

SGD_MOMENTUM = 0.9


def parameter_groups(
    model: nn.Module, *, lr: float, offset_lr_scale: float, weight_decay: float
) -> list[dict[str, object]]:
    """Four groups: offset branches or not (their rate is scaled), decayed or not.

    Biases and normalization parameters are not decayed.
    Source of the offsets' own rate: Dai et al. 2017, section 2.1.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_offset = any(branch in f".{name}" for branch in OFFSET_BRANCHES)
            groups.setdefault((is_offset, parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * (offset_lr_scale if is_offset else 1.0),
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        for (is_offset, is_decayed), parameters in sorted(groups.items(), key=lambda kv: kv[0])
    ]


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, offset_lr_scale: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, over `parameter_groups`."""
    groups = parameter_groups(
        model, lr=lr, offset_lr_scale=offset_lr_scale, weight_decay=weight_decay
    )
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=SGD_MOMENTUM, nesterov=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: int, power: float
) -> LambdaLR:
    """Linear warm-up, then the poly schedule (1 - step / total)^power, stepped per update."""
    warmup_steps = min(warmup_steps, total_steps - 1)

    def factor(step: int) -> float:
        warmup = (step + 1) / (warmup_steps + 1)
        poly = max(0.0, 1 - step / total_steps)
        return float(min(1.0, warmup) * poly**power)

    return LambdaLR(optimizer, factor)
