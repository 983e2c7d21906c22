from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from dcnseg.errors import ShapeError
from dcnseg.ops import offset_stats
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.ops.offset_stats import TapGrid, offset_statistics


def make_layer(**options: object) -> DeformConv2d:
    return DeformConv2d(4, 4, 3, **{"padding": 1, **options})  # type: ignore[arg-type]


def make_offset(layer: DeformConv2d, batch: int, size_hw: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    channels = layer.conv_offset.out_channels
    return 3 * torch.randn(batch, channels, *size_hw, generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1), "dilation": (2, 3), "padding": (2, 0)},
        {"offset_groups": 2, "modulated": True},
        {"padding": "same", "dilation": 2},
    ],
)
def test_equals_loops(options: dict[str, object]) -> None:
    layer = make_layer(**options)
    height, width = 9, 12
    height_out, width_out = layer.conv_offset(torch.zeros(1, 4, height, width)).shape[-2:]
    offset = make_offset(layer, 2, (height_out, width_out))
    grid = TapGrid.from_layer(layer)

    lengths, outside, plain_outside = [], [], []
    counts = (2, layer.offset_groups, 9, height_out, width_out)
    for b, g, t, row, column in product(*map(range, counts)):
        dy, dx = offset[b, (g * 9 + t) * 2 :, row, column][:2].tolist()
        y = row * grid.stride[0] - grid.padding[0] + t // 3 * grid.dilation[0]
        x = column * grid.stride[1] - grid.padding[1] + t % 3 * grid.dilation[1]
        lengths.append(math.hypot(dy, dx))
        outside.append(not (-1 < y + dy < height and -1 < x + dx < width))
        plain_outside.append(not (-1 < y < height and -1 < x < width))
    expected = torch.tensor(lengths, dtype=torch.float64)

    found = offset_statistics(layer, offset, (height, width))

    assert found.mean_px == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found.p95_px == pytest.approx(float(expected.quantile(0.95)), rel=1e-6)
    assert found.outside_share == pytest.approx(sum(outside) / len(outside))
    assert found.grid_outside_share == pytest.approx(sum(plain_outside) / len(plain_outside))


def test_zero_offset_has_length_zero_and_the_share_of_the_grid() -> None:
    layer = make_layer(padding=2, dilation=2)
    found = offset_statistics(layer, torch.zeros(2, 18, 7, 5), (7, 5))
    assert (found.mean_px, found.p95_px) == (0, 0)
    # With dilation 2, 2 of 3*7 rows are at y = -2 or -1 and 2 at 7 or 8; the same for columns.
    assert found.grid_outside_share == pytest.approx(1 - (17 / 21) * (11 / 15))
    assert found.outside_share == pytest.approx(found.grid_outside_share)


@pytest.mark.parametrize(("shift", "share"), [(-0.99, 0.0), (-1.0, 1.0), (0.99, 0.0), (1.0, 1.0)])
def test_sample_is_outside_if_it_reads_no_pixel(shift: float, share: float) -> None:
    layer = DeformConv2d(1, 1, 1)
    offset = torch.tensor([shift, 0.0]).reshape(1, 2, 1, 1)
    assert offset_statistics(layer, offset, (1, 1)).outside_share == share


def test_bfloat16_is_measured_in_float32() -> None:
    layer = make_layer()
    offset = make_offset(layer, 1, (6, 6)).bfloat16()
    assert offset_statistics(layer, offset, (6, 6)) == offset_statistics(
        layer, offset.float(), (6, 6)
    )


def test_nan_gives_nan_and_infinity_counts_as_outside() -> None:
    layer = make_layer(padding=0)
    offset = torch.zeros(1, 18, 4, 4)
    offset[0, 0] = torch.inf
    found = offset_statistics(layer, offset, (6, 6))
    assert found.mean_px == math.inf
    assert found.p95_px == math.inf
    assert found.outside_share == pytest.approx(1 / 9)
    offset[0, 3, 2, 2] = torch.nan
    found = offset_statistics(layer, offset, (6, 6))
    assert math.isnan(found.mean_px)
    assert math.isnan(found.p95_px)
    assert math.isnan(found.outside_share)
    assert found.grid_outside_share == 0


def test_percentile_of_a_large_tensor_uses_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    offset = make_offset(layer, 1, (64, 64))
    exact = offset_statistics(layer, offset, (64, 64)).p95_px
    monkeypatch.setattr(offset_stats, "MAX_QUANTILE_VALUES", 10_000)
    sampled = offset_statistics(layer, offset, (64, 64)).p95_px
    assert sampled != exact
    assert sampled == pytest.approx(exact, rel=0.03)


def test_needs_no_gradient() -> None:
    layer = make_layer()
    assert offset_statistics(layer, layer.conv_offset(torch.ones(1, 4, 5, 5)), (5, 5)).mean_px == 0


def test_too_few_channels_raise() -> None:
    with pytest.raises(ShapeError, match=r"\[1, 18, 4, 4\].* 3x3 kernel with offset_groups=2 .*36"):
        offset_statistics(make_layer(offset_groups=2), torch.zeros(1, 18, 4, 4), (4, 4))
