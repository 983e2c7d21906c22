from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.inference.strips import (
    StripMap,
    averaged,
    cropped,
    mirrored,
    resized,
    softmaxed,
    stored,
)

sides = st.integers(1, 40)


def in_strips(values: StripMap, rows: int) -> Tensor:
    height = values.size_hw[0]
    parts = [values.rows(top, min(top + rows, height)) for top in range(0, height, rows)]
    return torch.cat(parts, dim=1)


@given(sides, sides, sides, sides, st.booleans(), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_resized_equals_interpolate(
    h: int, w: int, height: int, width: int, align_corners: bool, rows: int
) -> None:
    values = torch.randn(3, h, w)
    expected = F.interpolate(
        values[None], size=(height, width), mode="bilinear", align_corners=align_corners
    )[0]
    actual = resized(stored(values), (height, width), align_corners=align_corners)
    assert actual.size_hw == (height, width)
    torch.testing.assert_close(in_strips(actual, rows), expected, atol=1e-5, rtol=1e-5)


def test_resized_far_from_the_origin() -> None:
    """Where float32 positions have few digits left for the fraction."""
    values = torch.randn(1, 3000, 2)
    expected = F.interpolate(values[None], size=(12001, 2), mode="bilinear")[0]
    actual = resized(stored(values), (12001, 2)).rows(11000, 12001)
    torch.testing.assert_close(actual, expected[:, 11000:], atol=1e-5, rtol=1e-5)


@given(st.integers(1, 9))
def test_maps_equal_the_tensor_operations(rows: int) -> None:
    values, other = torch.randn(2, 3, 9, 7)
    one, two = stored(values), stored(other)
    assert torch.equal(in_strips(mirrored(one), rows), values.flip(-1))
    torch.testing.assert_close(in_strips(softmaxed(one), rows), values.softmax(0))
    torch.testing.assert_close(in_strips(averaged([one, two]), rows), (values + other) / 2)
    assert torch.equal(in_strips(cropped(one, (5, 4)), rows), values[:, :5, :4])
    assert averaged([one]) is one


def test_huge_logits_give_finite_probabilities() -> None:
    values = torch.tensor([[[3e38], [-3e38]], [[-3e38], [3e38]]])
    probabilities = softmaxed(resized(stored(values), (7, 1), align_corners=True))
    assert probabilities.rows(0, 7).isfinite().all()
