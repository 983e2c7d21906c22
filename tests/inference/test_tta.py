from __future__ import annotations

import torch
from torch import Tensor

from dcnseg.inference.strips import StripMap, stored
from dcnseg.inference.tta import augmented


def whole(values: StripMap) -> Tensor:
    return values.rows(0, values.size_hw[0])


def test_no_augmentation_returns_the_function() -> None:
    def predict(x: Tensor) -> StripMap:
        return stored(x[0])

    assert augmented(predict, flip=False, scales=(1.0,)) is predict


def test_scales_are_applied_and_undone() -> None:
    seen = []

    def predict(x: Tensor) -> StripMap:
        seen.append(tuple(x.shape[-2:]))
        return stored(torch.full((2, *x.shape[-2:]), float(x.shape[-1])))

    result = augmented(predict, flip=True, scales=(0.5, 1.0, 1.5))(torch.zeros(1, 3, 20, 31))
    assert seen == [(10, 16), (20, 31), (30, 46)] * 2
    torch.testing.assert_close(whole(result), torch.full((2, 20, 31), (16 + 31 + 46) / 3))
