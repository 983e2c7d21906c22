"""Finds where NaN or infinity comes from; the entry point is `first_not_finite`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcnseg.engine.updates import Updater


def first_not_finite(model: nn.Module, updater: Updater, images: Tensor, labels: Tensor) -> str:
    """What is the first thing that is not finite on a batch, in words.

    Looked at in this order: the weights, the images, the outputs of the layers, the loss, and
    the gradients from the last layer to the first. The gradients are lost.

    Args:
        model: The network, in training mode.
        updater: What computes its loss.
        images: The batch's images, float32 [B, 3, h, w].
        labels: Their label maps, int64 [B, h, w].
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not _is_finite(tensor):
            return f"the weight {name}"
    if not _is_finite(images):
        return "a pixel of the images"
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not _is_finite(output):
            found.append(name)

    handles = [
        layer.register_forward_hook(lambda _layer, _inputs, output, name=name: look(name, output))
        for name, layer in model.named_modules()
        if name and not any(layer.children())
    ]
    try:
        loss = updater.forward(images, labels)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the output of the layer {found[0]}"
    if not _is_finite(loss):
        return "the loss, of outputs that are all finite"
    model.zero_grad(set_to_none=True)
    loss.backward()
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return f"the gradient of {name}"
    return "the length of the gradient, though each of its numbers is finite"


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())
