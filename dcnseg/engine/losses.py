"""Losses of logits against label maps with ignored pixels; entry point `build_loss`."""

from __future__ import annotations

from collections.abc import Callable

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor

from dcnseg.data.class_map import IGNORE_INDEX

Loss = Callable[[Tensor, Tensor], Tensor]
MODE = "multiclass"


def build_loss(name: str, class_weights: Tensor | None) -> Loss:
    """The loss `name`: "ce", "ce+dice", "focal" or "lovasz" (with half a cross entropy beside it).

    Args:
        name: As `--loss`.
        class_weights: Weight of each class in the cross entropy and focal terms, [K], or None.

    Returns:
        A function of logits [B, K, H, W] and labels int64 [B, H, W] (0..K-1, or 255 where ignored)
        that gives a scalar; 0, with a gradient of 0, where every pixel is ignored.
    """
    weights = None if class_weights is None else class_weights.tolist()

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, weight=class_weights, ignore_index=IGNORE_INDEX)

    def ce_and_dice(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels) + dice(logits, labels)

    # The Lovasz extension alone gives hardly a gradient to a network that starts from scratch.
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


def balance_classes(pixel_counts: Tensor, mode: str) -> Tensor | None:
    """Weights that make rare classes count more, with mean 1 over the training pixels.

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
