"""Test-time augmentation: mean over flips and scales; entry point `augmented`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from dcnseg.data.dataset import scaled_size_hw
from dcnseg.inference.strips import StripMap, averaged, mirrored, resized

Predict = Callable[[Tensor], StripMap]


def augmented(predict: Predict, *, flip: bool, scales: Sequence[float]) -> Predict:
    """Return a function that averages `predict` over scaled and flipped copies of its input.

    Args:
        predict: Maps an image [1, 3, h, w] to values [K, h, w].
        flip: Whether to add a horizontal flip of every scale.
        scales: Factors by which the image is resized; the values are resized back.
    """
    if not flip and tuple(scales) == (1.0,):
        return predict

    def predict_augmented(image: Tensor) -> StripMap:
        views = [_at_scale(predict, image, scale) for scale in scales]
        if flip:
            flipped = image.flip(-1)
            views += [mirrored(_at_scale(predict, flipped, scale)) for scale in scales]
        return averaged(views)

    return predict_augmented


def _at_scale(predict: Predict, image: Tensor, scale: float) -> StripMap:
    height, width = image.shape[-2:]
    if scale != 1:
        size = scaled_size_hw((height, width), scale)
        image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
    return resized(predict(image), (height, width))
