from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.inference.sliding_window import (
    compute_blending_weights,
    compute_window_starts,
    predict_strips,
)
from dcnseg.inference.strips import StripMap, stored

sizes = st.integers(1, 100)
windows = st.integers(1, 40)
overlaps = st.floats(0, 0.75)


def stitch(values: Tensor, window: tuple[int, int], overlap: float, max_rows: int) -> Tensor:
    """Predict with a network that returns its input, and concatenate the strips."""
    height, width = values.shape[-2:]

    def predict(rows: slice, columns: slice) -> StripMap:
        assert 0 <= rows.start < rows.stop <= min(height, rows.start + window[0])
        assert 0 <= columns.start < columns.stop <= min(width, columns.start + window[1])
        return stored(values[:, rows, columns])

    strips = list(predict_strips(predict, (height, width), window, overlap, max_rows=max_rows))
    tops = [top for top, _ in strips]
    ends = [top + strip.shape[1] for top, strip in strips]
    assert tops == [0, *ends[:-1]]  # no gap, no row twice
    assert max(strip.shape[1] for _, strip in strips) <= max_rows
    return torch.cat([strip for _, strip in strips], dim=1)


@given(sizes, sizes, windows, windows, overlaps, st.integers(1, 80))
@settings(max_examples=100, deadline=None)
def test_identity_network_returns_the_image(
    height: int, width: int, window_h: int, window_w: int, overlap: float, max_rows: int
) -> None:
    """A weight of zero, or a pixel in no window, would be NaN."""
    assume(max(height / window_h, width / window_w) < 20)
    values = torch.randn(2, height, width)
    actual = stitch(values, (window_h, window_w), overlap, max_rows)
    torch.testing.assert_close(actual, values, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 500), st.integers(1, 100), overlaps)
def test_windows_cover_the_length_with_enough_overlap(
    length: int, window: int, overlap: float
) -> None:
    starts = compute_window_starts(length, window, overlap)
    assert starts[0] == 0
    if length <= window:
        assert starts == [0]
        return
    assert starts[-1] + window == length
    steps = [b - a for a, b in pairwise(starts)]
    assert all(0 < step <= max(1, window * (1 - overlap)) for step in steps)


@given(st.integers(1, 2000))
def test_weights_are_positive_and_symmetric(length: int) -> None:
    weights = compute_blending_weights(length)
    assert weights.min() > 0
    assert weights.max() <= 1
    torch.testing.assert_close(weights, weights.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights[length // 2], weights.max())


def test_blending_is_smooth() -> None:
    calls = iter([0.0, 1.0])

    def predict(rows: slice, columns: slice) -> StripMap:
        return stored(torch.full((1, 64, 64), next(calls)))

    ((_, strip),) = predict_strips(predict, (64, 96), (64, 64), 0.5, max_rows=64)
    row = strip[0, 32]
    assert row[0] == 0
    assert row[-1] == 1
    assert row.diff().min() >= 0
    assert row.diff().max() < 0.08


def test_windows_are_predicted_on_demand() -> None:
    predicted: list[int] = []

    def predict(rows: slice, columns: slice) -> StripMap:
        predicted.append(rows.start)
        return stored(torch.zeros(1, 64, 32))

    for top, _ in predict_strips(predict, (4000, 32), (64, 64), 0.25, max_rows=8):
        assert max(predicted) <= top
    assert len(predicted) == len(compute_window_starts(4000, 64, 0.25))


@given(st.integers(1, 200), st.integers(1, 40), overlaps, st.data())
@settings(max_examples=50, deadline=None)
def test_values_of_some_columns_are_those_of_all_columns(
    width: int, window: int, overlap: float, data: st.DataObject
) -> None:
    assume(width / window < 20)
    first = data.draw(st.integers(0, width - 1))
    columns = slice(first, data.draw(st.integers(first + 1, width)))
    values = torch.randn(2, 50, width)

    def predict(rows: slice, window_columns: slice) -> StripMap:
        share = (window_columns.start + 1) / (rows.start + 7)  # windows differ
        return stored(values[:, rows, window_columns] * share)

    def stitch(columns: slice | None) -> Tensor:
        strips = predict_strips(
            predict, (50, width), (30, window), overlap, max_rows=9, columns=columns
        )
        return torch.cat([strip for _, strip in strips], dim=1)

    assert torch.equal(stitch(columns), stitch(None)[:, :, columns])
