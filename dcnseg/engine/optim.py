"""Losses, optimizer and learning-rate schedule.

Entry points: `build_loss`, `build_loss_weight`, `balance_classes`, `build_optimizer`,
`build_schedule`.
"""

from __future__ import annotations

from collections.abc import Callable

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.ops import OFFSET_BRANCHES

Loss = Callable[[Tensor, Tensor], Tensor]
LossWeight = Callable[[Tensor], Tensor]
MODE = "multiclass"
SGD_MOMENTUM = 0.9


def build_loss(name: str, class_weights: Tensor | None) -> Loss:
    """Build the loss `name`: "ce", "ce+dice", "focal" or "lovasz" (plus half the cross entropy).

    Args:
        name: Value of `--loss`.
        class_weights: Weight of each class in the cross-entropy and focal terms, [K], or None.

    Returns:
        A function of logits [B, K, H, W] and labels int64 [B, H, W] (0..K-1, or 255 for ignored
        pixels) that returns a scalar. The loss and its gradient are 0 if all pixels are ignored.
    """
    weights = None if class_weights is None else class_weights.tolist()

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, weight=class_weights, ignore_index=IGNORE_INDEX)

    def ce_and_dice(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels) + dice(logits, labels)

    # The Lovasz extension alone has almost no gradient for a network trained from scratch.
    def ce_and_lovasz(logits: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * cross_entropy(logits, labels) + lovasz(logits, labels)

    dice: Loss = smp.losses.DiceLoss(MODE, ignore_index=IGNORE_INDEX)
    lovasz: Loss = smp.losses.LovaszLoss(MODE, ignore_index=IGNORE_INDEX)
    losses: dict[str, Loss] = {
        "ce": cross_entropy,
        "ce+dice": ce_and_dice,
        "focal": smp.losses.FocalLoss(MODE, ignore_index=IGNORE_INDEX, class_weights=weights),
        "lovasz": ce_and_lovasz,
    }
    chosen = losses[name]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if bool((labels == IGNORE_INDEX).all()):
            return logits.sum() * 0.0
        return chosen(logits.float(), labels)

    return loss


def build_loss_weight(name: str, class_weights: Tensor | None) -> LossWeight:
    """Build a function of labels that returns the weight of their loss in a larger batch.

    The loss of a batch is the mean of the losses of its parts with these weights. This is exact for
    "ce" and "focal", which are means over pixels; the Dice and Lovasz terms are not.

    Args:
        name: Value of `--loss`.
        class_weights: As for `build_loss`.

    Returns:
        A function of labels int64 [B, H, W] that returns a float64 scalar.
    """

    def weigh(labels: Tensor) -> Tensor:
        is_known = labels != IGNORE_INDEX
        if class_weights is None or name == "focal":  # a mean over pixels, whatever their class
            return is_known.sum(dtype=torch.float64)
        return (class_weights[labels.where(is_known, 0)] * is_known).sum(dtype=torch.float64)

    return weigh


def balance_classes(pixel_counts: Tensor, mode: str) -> Tensor | None:
    """Compute class weights that emphasize rare classes; their mean over the pixels is 1.

    Args:
        pixel_counts: Training pixels of each class, [K]; a class without pixels gets weight 0.
        mode: "none", "balanced" (inverse frequency) or "sqrt" (its square root).
    """
    if mode == "none":
        return None
    frequency = pixel_counts.double() / pixel_counts.sum().clamp_min(1)
    power = 1.0 if mode == "balanced" else 0.5
    raw = torch.where(frequency > 0, frequency.clamp_min(1e-12).pow(-power), 0.0)
    return (raw / (raw * frequency).sum().clamp_min(1e-12)).float()


def parameter_groups(
    model: nn.Module, *, lr: float, offset_lr: float, weight_decay: float
) -> list[dict[str, object]]:
    """Split the parameters by learning rate (offset branches have their own) and weight decay.

    Biases and normalization parameters have no weight decay. Source of the separate learning rate
    for offsets: Dai et al. 2017, section 2.1.

    Args:
        model: The network.
        lr: Peak learning rate.
        offset_lr: Peak learning rate of the offset branches.
        weight_decay: Weight decay of the other parameters.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_offset = any(branch in f".{name}" for branch in OFFSET_BRANCHES)
            groups.setdefault((is_offset, parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": offset_lr if is_offset else lr,
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        for (is_offset, is_decayed), parameters in sorted(groups.items(), key=lambda kv: kv[0])
    ]


def build_optimizer(
    model: nn.Module, name: str, *, lr: float, offset_lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build AdamW, or SGD with Nesterov momentum, over `parameter_groups`."""
    groups = parameter_groups(model, lr=lr, offset_lr=offset_lr, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=SGD_MOMENTUM, nesterov=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, *, total_steps: int, warmup_steps: int, power: float
) -> LambdaLR:
    """Build a linear warm-up times the poly schedule (1 - step / total)^power, stepped per update.

    The warm-up is shortened to `total_steps - 1`.
    """
    warmup_steps = min(warmup_steps, total_steps - 1)

    def factor(step: int) -> float:
        warmup = (step + 1) / (warmup_steps + 1)
        poly = max(0.0, 1 - step / total_steps)
        return float(min(1.0, warmup) * poly**power)

    return LambdaLR(optimizer, factor)
