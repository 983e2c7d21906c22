from __future__ import annotations

import numpy as np
import pytest
import torch

from dcnseg.visualize.measures.placed_layer import choose_paths, place_layer, trace_paths
from dcnseg.visualize.offsets import (
    LayerOffsets,
    compute_sampling_positions,
    trace_cascade,
)
from tests.layer_offsets import make_layer, make_radial_offset, make_zero_offset

HW = (6, 7)


def draw_layer(seed: int, *, groups: int = 1, is_modulated: bool = False) -> LayerOffsets:
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(groups, 9, 2, *HW, generator=generator)
    mask = 2 * torch.rand(groups, 9, *HW, generator=generator) if is_modulated else None
    return make_layer(offset, mask)


def test_points_are_the_sampling_positions() -> None:
    layer = draw_layer(0, groups=2)
    placed = place_layer(layer, (24, 28), np.random.default_rng(0))
    sites = np.array([0, 9, 41])
    for kind, is_plain in (("own", False), ("plain", True)):
        expected = compute_sampling_positions(layer, is_plain=is_plain).flatten(0, 1)
        for i, site in enumerate(sites):
            of_site = expected[:, :, site // 7, site % 7].numpy()
            np.testing.assert_allclose(placed.points(kind, sites)[:, i], of_site)
    assert [a.tolist() for a in placed.pixels(sites)] == [[0, 4, 20], [0, 8, 24]]


def test_shuffling_keeps_the_offsets_of_measured_locations() -> None:
    layer = draw_layer(1)
    layer.offset[0, 3, 1, 2, 2] = torch.nan
    # The last row and the last two columns are outside the image.
    placed = place_layer(layer, (20, 20), np.random.default_rng(3))
    inside = np.zeros(HW, bool)
    inside[:5, :5] = True
    assert (placed.is_inside == inside).all()
    inside[2, 2] = False
    assert (placed.is_measured == inside).all()
    own, shuffled = (placed.displacements[kind][:, placed.sites] for kind in ("own", "shuffled"))
    assert not torch.equal(own, shuffled)

    def ordered(displacement: torch.Tensor) -> list[list[float]]:
        return sorted(displacement.transpose(0, 1).flatten(1).tolist())

    assert ordered(own) == ordered(shuffled)
    again = place_layer(layer, (20, 20), np.random.default_rng(3))
    assert torch.equal(again.displacements["shuffled"][:, placed.sites], shuffled)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_paths_match_the_cascade_of_single_points(num_layers: int) -> None:
    layers = [draw_layer(seed, is_modulated=seed != 1) for seed in range(num_layers)]
    placed = [place_layer(layer, (24, 28), np.random.default_rng(0)) for layer in layers]
    paths = choose_paths(placed, 1000, np.random.default_rng(0))
    assert paths.shape == (num_layers, 9**num_layers)
    sites = np.array([10, 33])
    for kind, is_plain in (("own", False), ("plain", True)):
        points, weights = trace_paths(placed, kind, paths, sites)
        for i, (row, column) in enumerate(((1, 3), (4, 5))):
            expected = trace_cascade(layers, (column * 4.0, row * 4.0), is_plain=is_plain)
            # The taps of the last layer change slowest there.
            order = np.ravel_multi_index(tuple(paths[::-1]), (9,) * num_layers)
            found = points[:, i, ::-1]
            np.testing.assert_allclose(found, expected.positions_xy.numpy()[order])
            if not is_plain:
                np.testing.assert_allclose(weights[:, i], expected.weights.numpy()[order], 1e-6)


def test_some_of_many_paths_are_drawn_once() -> None:
    layer = make_layer(make_zero_offset(HW, groups=4))
    placed = [place_layer(layer, (24, 28), np.random.default_rng(0))] * 3
    paths = choose_paths(placed, 81, np.random.default_rng(0))
    assert paths.shape == (3, 81)
    assert len(set(map(tuple, paths.T.tolist()))) == 81
    assert paths.max() < 36
    assert len(np.unique(paths)) > 30


def test_a_nan_ends_only_its_paths() -> None:
    first = make_layer(make_radial_offset(torch.full(HW, 1.0)))
    first.offset[0, 4, 0, 0, 0] = torch.nan
    placed = [place_layer(layer, (24, 28), np.random.default_rng(0)) for layer in (first, first)]
    paths = choose_paths(placed, 81, np.random.default_rng(0))
    points, _ = trace_paths(placed, "own", paths, np.array([8, 30]))
    # Only the upper left tap of the location (1, 1) is at (0, 0), whose central tap is NaN.
    assert np.isnan(points[:, 0]).any(1).sum() == 1
    assert np.isfinite(points[:, 1]).all()
