from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dcnseg.scoring.counts import Floats
from dcnseg.visualize.measures.sums import (
    HitCounts,
    MaskSums,
    Moments,
    ObjectDilations,
    OffsetSpread,
)

VALUES = arrays(np.float64, st.integers(0, 20), elements=st.floats(-100, 100))


@given(st.lists(VALUES, min_size=1, max_size=4), st.integers(0, 1000))
def test_moments_of_parts_are_those_of_the_whole(parts: list[Floats], seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells = [rng.integers(0, 3, len(part)) for part in parts]
    found = Moments.of(cells[0], parts[0], 4)
    for part, of_part in zip(parts[1:], cells[1:], strict=True):
        found = found.merged(Moments.of(of_part, part, 4))
    values, owners = np.concatenate(parts), np.concatenate(cells)
    for chosen in (np.array([True, False, False, True]), np.array([True, True, True, False])):
        count, mean, deviation = found.pooled(chosen)
        of_chosen = values[chosen[owners]]
        assert count == len(of_chosen)
        if count:
            assert (mean, deviation) == pytest.approx((of_chosen.mean(), of_chosen.std()), abs=1e-6)
        else:
            assert np.isnan([mean, deviation]).all()


def test_a_constant_has_no_deviation() -> None:
    cells = np.zeros(1000, np.int64)
    moments = Moments.of(cells, np.full(1000, 64.0), 1).merged(
        Moments.of(cells, np.full(1000, 64.0), 1)
    )
    assert moments.pooled(np.array([True])) == (2000, 64.0, 0.0)


def test_hits_are_counted_by_kind_and_cell() -> None:
    counts = HitCounts(3)
    counts.add("own", np.array([0, 0, 2]), np.array([1, 2, 9]), np.array([9, 9, 9]))
    counts.add("own", np.array([0]), np.array([0]), np.array([9]))
    counts.add("plain", np.array([0]), np.array([3]), np.array([6]))
    first = np.array([True, False, False])
    assert counts.share("own", first) == pytest.approx(3 / 27)
    assert counts.share("plain", first) == 0.5
    assert counts.share("own", ~first) == 1
    assert np.isnan(counts.share("plain", ~first))
    assert counts.locations.tolist() == [3, 0, 1]


def spread_of(maps: Floats) -> OffsetSpread:
    spread = OffsetSpread()
    for offset in maps:
        spread.add(offset, np.ones(offset.shape[1:], bool))
    return spread


def test_constant_offsets_are_constant() -> None:
    offset = np.random.default_rng(0).normal(size=(18, 1, 1)) * np.ones((18, 5, 6))
    spread = spread_of(np.stack([offset] * 3))
    assert spread.shares() == pytest.approx((1, 0, 0))
    np.testing.assert_allclose(spread.mean, offset[:, 0, 0])
    assert spread.rms_px == pytest.approx(np.sqrt((offset[:, 0, 0] ** 2).sum() / 9))


def test_offsets_of_the_place_and_of_the_content() -> None:
    rng = np.random.default_rng(1)
    by_place = rng.normal(size=(18, 8, 9))
    by_place -= by_place.mean((1, 2), keepdims=True)
    assert spread_of(np.stack([by_place] * 4)).shares() == pytest.approx((0, 1, 0))
    # Independent of the place: without the correction, a quarter would count as position.
    content = rng.normal(size=(4, 18, 40, 50))
    constant, position, in_content = spread_of(content).shares()
    assert constant < 0.001
    assert position < 0.01
    assert in_content > 0.99


@given(arrays(np.float64, (3, 4, 2, 2), elements=st.floats(-8, 8).filter(lambda v: abs(v) > 1e-3)))
def test_shares_are_those_of_an_analysis_of_variance(maps: Floats) -> None:
    n, places = maps.shape[0], maps[0, 0].size
    whole = constant = between = within = 0.0
    for c in range(maps.shape[1]):
        values = maps[:, c].reshape(n, places)
        center = values.mean()
        constant += center**2
        whole += float((values**2).mean())
        for place in range(places):
            mean = values[:, place].mean()
            between += (mean - center) ** 2 / places
            within += ((values[:, place] - mean) ** 2).sum() / (n - 1) / places
    shares = spread_of(maps).shares()
    assert sum(shares) == pytest.approx(1)
    assert shares.constant == pytest.approx(constant / whole, abs=1e-9)
    assert shares.position == pytest.approx(max(0, between - within / n) / whole, abs=1e-9)
    assert min(shares) > -1e-9


def test_position_needs_maps_of_one_size() -> None:
    spread = spread_of(np.ones((2, 18, 5, 6)))
    spread.add(2 * np.ones((18, 5, 7)), np.ones((5, 7), bool))
    shares = spread.shares()
    # 60 locations have 1, and 35 have 2.
    assert shares.constant == pytest.approx((130 / 95) ** 2 / (200 / 95))
    assert np.isnan([shares.position, shares.content]).all()
    single = spread_of(np.ones((1, 18, 5, 6))).shares()
    assert single.constant == pytest.approx(1)
    assert np.isnan(single.position)
    assert np.isnan(spread_of(np.zeros((2, 18, 5, 6))).shares()).all()
    assert np.isnan(OffsetSpread().rms_px)


def test_locations_that_are_not_measured_do_not_count() -> None:
    offset = np.ones((18, 2, 3))
    offset[0, 0, 1] = np.nan
    is_measured = np.asarray(np.isfinite(offset).all(axis=0))
    spread = OffsetSpread()
    for _ in range(2):
        spread.add(offset, is_measured)
    assert spread.num_locations == 10
    assert spread.shares() == pytest.approx((1, 0, 0))


def test_modulation() -> None:
    masks = MaskSums(2)
    masks.add(np.array([[0.05, 0.1, 1.95], [2.0, 1.9, 1.0]]))
    masks.add(np.array([[0.0], [1.0]]))
    assert masks.num_locations == 4
    assert masks.sums == pytest.approx([2.1, 5.9])
    assert (masks.num_low, masks.num_high) == (2, 2)


def test_each_object_has_its_mean_dilation() -> None:
    objects = ObjectDilations()
    numbers = np.array([1, 3, 1, 0, -1, 4], np.int32)  # 4 is the background of three objects
    objects.add(numbers, np.array([8.0, 5.0, 10.0, 99.0, 99.0, 99.0]), np.array([20, 30, 40]))
    objects.add(np.array([1], np.int32), np.array([6.0]), np.array([50]))
    assert objects.areas == [20, 40, 50]
    assert objects.dilations_px == [9, 5, 6]
    objects.add(np.zeros(0, np.int32), np.zeros(0), np.zeros(0, np.int64))
    assert len(objects.areas) == 3
