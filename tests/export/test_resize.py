from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcnseg.data.dataset import scaled_size_hw
from dcnseg.export.resize import resize_antialiased, scaled_length


@pytest.mark.parametrize("scale", [0.1, 0.25, 0.3, 0.5, 0.625, 0.75, 1 / 3, 1.5, 2.0])
def test_lengths_are_rounded_as_in_prediction(scale: float) -> None:
    for length in range(1, 3000):
        expected = scaled_size_hw((length, length), scale)[0]
        assert max(1, scaled_length(length, scale)) == expected


@pytest.mark.parametrize(
    ("size_hw", "result_hw"), [((40, 60), (20, 30)), ((41, 7), (12, 5)), ((9, 8), (30, 17))]
)
def test_images_are_resized_as_in_prediction(
    size_hw: tuple[int, int], result_hw: tuple[int, int]
) -> None:
    x = torch.randn(2, 3, *size_hw)
    expected = F.interpolate(x, result_hw, mode="bilinear", antialias=True)
    torch.testing.assert_close(resize_antialiased(x, result_hw), expected, atol=1e-5, rtol=0)
