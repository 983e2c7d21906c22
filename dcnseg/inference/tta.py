"""Test-time augmentation: the mean over flips and scales of any function from picture to values.

Entry point: `augmented`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dcnseg.data.dataset import scaled_size_hw


def augmented(
    predict: Callable[[Tensor], Tensor], *, flip: bool, scales: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """A function like `predict` that averages over scaled and mirrored copies of its input.

    Args:
        predict: From pictures [B, 3, h, w] to values [B, K, h, w].
        flip: Whether to add the mirror image (left to right) of every scale.
        scales: Factors by which the picture is resized; values are resized back.
    """
    if not flip and tuple(scales) == (1.0,):
        return predict

    def predict_augmented(image: Tensor) -> Tensor:
        views = [
            _at_scale(predict, view, scale).flip(-1)
            if is_flipped
            else _at_scale(predict, view, scale)
            for is_flipped, view in ((False, image), (True, image.flip(-1)))
            if flip or not is_flipped
            for scale in scales
        ]
        return torch.stack(views).mean(dim=0)

    return predict_augmented


def _at_scale(predict: Callable[[Tensor], Tensor], image: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return predict(image)
    resized = F.interpolate(
        image, size=scaled_size_hw(image.shape[-2:], scale), mode="bilinear", antialias=True
    )
    return F.interpolate(predict(resized), size=image.shape[-2:], mode="bilinear")
