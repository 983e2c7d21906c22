from __future__ import annotations

import torch
from torch import Tensor

from dcnseg.inference.tta import augmented


def test_without_augmentation_the_function_itself_comes_back() -> None:
    def predict(x: Tensor) -> Tensor:
        return x

    assert augmented(predict, flip=False, scales=(1.0,)) is predict


def test_flip_averages_both_views() -> None:
    ramp = torch.arange(4.0).view(1, 1, 1, 4)
    result = augmented(lambda x: x * 0 + ramp, flip=True, scales=(1.0,))(torch.zeros(1, 1, 1, 4))
    assert torch.equal(result, torch.full((1, 1, 1, 4), 1.5))


def test_a_function_that_follows_flips_is_unchanged() -> None:
    x = torch.randn(1, 3, 8, 10)
    torch.testing.assert_close(augmented(lambda v: v * 2, flip=True, scales=(1.0,))(x), x * 2)


def test_scales_are_seen_and_undone() -> None:
    seen = []

    def predict(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[-2:]))
        return torch.full((1, 2, *x.shape[-2:]), float(x.shape[-1]))

    result = augmented(predict, flip=True, scales=(0.5, 1.0, 1.5))(torch.zeros(1, 3, 20, 31))
    assert seen == [(10, 16), (20, 31), (30, 46)] * 2
    assert result.shape == (1, 2, 20, 31)
    torch.testing.assert_close(result, torch.full((1, 2, 20, 31), (16 + 31 + 46) / 3))
