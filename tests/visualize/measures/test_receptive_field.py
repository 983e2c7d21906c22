from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcnseg.config import Preprocessing
from dcnseg.inference.predictor import Predictor
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.visualize.measures import receptive_field
from dcnseg.visualize.measures.receptive_field import (
    PixelSampler,
    compute_radii,
    measure_fields,
)
from dcnseg.visualize.measures.results import FieldRadius
from tests.layer_offsets import CLASSES


class Network(nn.Module):
    """A deformable 3x3 box filter at full resolution, with the same offset (dy, dx) everywhere."""

    def __init__(self, shift_yx: tuple[float, float] = (0, 0), weight: float = 1.0) -> None:
        super().__init__()
        self.layer = DeformConv2d(3, 3, 3, padding=1, bias=False)
        self.layer.backend = "reference"
        nn.init.constant_(self.layer.weight, weight)
        assert self.layer.conv_offset.bias is not None
        self.layer.conv_offset.bias.data[:] = torch.tensor(shift_yx * 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]

    def deformable_layers(self) -> dict[str, DeformConv2d]:
        return {"layer": self.layer}


def measure_one(
    network: Network,
    *,
    hw: tuple[int, int] = (40, 48),
    at: tuple[int, int] = (20, 24),
    input_scale: float = 1.0,
) -> FieldRadius:
    """Measure the field of class 1, which has one pixel."""
    predictor = Predictor(
        network,  # type: ignore[arg-type]
        CLASSES,
        Preprocessing(input_scale=input_scale),
        device=torch.device("cpu"),
    )
    labels = np.full(hw, 255, np.uint8)
    labels[at] = 1
    sampler = PixelSampler(3, 2)
    sampler.add(labels)
    image = np.random.default_rng(0).integers(0, 256, (*hw, 3), np.uint8)
    calls: list[tuple[int, ...]] = []
    fields = measure_fields(
        predictor, sampler, lambda _: image, on_progress=lambda *done: calls.append(done)
    )
    assert list(fields) == ["disc"]
    assert calls == [(1, 1)]
    assert all(parameter.requires_grad for parameter in network.parameters())
    return fields["disc"]


def test_box_filter() -> None:
    found = measure_one(Network())
    assert found.pixels == 2
    radii = (found.half_px, found.most_px, found.zeroed_half_px, found.zeroed_most_px)
    assert radii == pytest.approx((1, math.sqrt(2), 1, math.sqrt(2)))


@pytest.mark.parametrize("shift", [(3, 0), (-2, 4)])
def test_offsets_move_the_field(shift: tuple[int, int]) -> None:
    found = measure_one(Network(shift))
    distances = sorted(
        math.hypot(shift[0] + y, shift[1] + x) for y in (-1, 0, 1) for x in (-1, 0, 1)
    )
    assert (found.half_px, found.most_px) == pytest.approx((distances[4], distances[8]))
    assert (found.zeroed_half_px, found.zeroed_most_px) == pytest.approx((1, math.sqrt(2)))


def test_radii_are_in_pixels_of_the_image() -> None:
    found = measure_one(Network(), input_scale=0.5)
    assert (found.half_px, found.most_px) == pytest.approx((2, math.sqrt(8)))


@pytest.mark.parametrize("at", [(20, 24), (33, 6), (6, 41)])
def test_a_window_has_the_same_field(monkeypatch: pytest.MonkeyPatch, at: tuple[int, int]) -> None:
    monkeypatch.setattr(receptive_field, "WINDOW", 12)
    found = measure_one(Network((2, 0)), at=at)
    assert (found.half_px, found.most_px) == pytest.approx((math.sqrt(5), math.sqrt(10)))


def test_a_network_without_a_gradient_has_no_field() -> None:
    found = measure_one(Network(weight=0.0))
    assert found.pixels == 0
    assert math.isnan(found.half_px)
    assert math.isnan(found.zeroed_most_px)


def test_radii_of_maps() -> None:
    pixel = np.array([1.0, 1.0])
    assert np.isnan(compute_radii(np.zeros((3, 3)), (1, 1), pixel)).all()
    assert np.isnan(compute_radii(np.full((3, 3), np.nan), (1, 1), pixel)).all()
    line = np.ones((1, 10))
    assert compute_radii(line, (0, 0), pixel).tolist() == [4, 8]
    assert compute_radii(line.T, (0, 0), np.array([3.0, 1.0])).tolist() == [12, 24]


def test_every_pixel_is_drawn_alike() -> None:
    first, second = np.full((2, 6, 5), 255, np.uint8)
    first[1, :3] = 2
    second[3, 4] = 2
    second[0, 0] = 0
    sampler = PixelSampler(3, 4000, seed=1)
    for labels in (first, second):
        sampler.add(labels)
    counts: dict[tuple[int, int, int], int] = {}
    for image, pixels in sampler.by_image().items():
        for pixel in pixels:
            if pixel.class_index == 2:
                place = (image, pixel.row, pixel.column)
                counts[place] = counts.get(place, 0) + 1
            else:
                assert (image, pixel) == (1, receptive_field.ClassPixel(0, 0, 0))
    assert set(counts) == {(0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 3, 4)}
    assert sum(counts.values()) == 4000
    assert all(900 < count < 1100 for count in counts.values())


def test_without_pixels_nothing_is_drawn() -> None:
    sampler = PixelSampler(3, 0)
    sampler.add(np.ones((4, 4), np.uint8))
    assert sampler.by_image() == {}
