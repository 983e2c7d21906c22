from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcnseg.ops.roi.checks import Corners, Mode
from dcnseg.ops.roi.geometry import (
    Regions,
    locate_regions,
    make_bins,
    make_samples,
    make_shift,
    position_dtype,
)
from tests.ops.common import NEEDS_GPU
from tests.ops.roi_cases import bins_along, half_away, samples_along

CORNERS: tuple[Corners | None, ...] = (None, *get_args(Corners))
MODES: tuple[Mode, ...] = get_args(Mode)
NAN, INF = math.nan, math.inf

few = settings(max_examples=60, deadline=None, derandomize=True)


def regions_of(boxes: list[list[float]], dtype: torch.dtype = torch.float64) -> Regions:
    tensor = torch.tensor(boxes, dtype=torch.float64).view(-1, 5)
    return locate_regions(tensor, torch.zeros(2, 1, 1, 1, dtype=dtype))


coordinates = st.one_of(
    st.floats(-40, 60),
    st.integers(-80, 120).map(lambda n: n / 4),
    st.sampled_from([1e30, -1e30, 2.0**31, -(2.0**63), 1e300]),
)


@few
@given(
    box=st.lists(coordinates, min_size=4, max_size=4),
    scale=st.sampled_from([1.0, 0.5, 0.0625, 0.37]),
    output_size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    size_hw=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    corners=st.sampled_from(CORNERS),
)
def test_bins_equal_the_formula(
    box: list[float],
    scale: float,
    output_size: tuple[int, int],
    size_hw: tuple[int, int],
    corners: Corners | None,
) -> None:
    x1, y1, x2, y2 = (max(-(2.0**100), min(v, 2.0**100)) for v in box)
    bins = make_bins(regions_of([[1, *box]]), output_size, scale, size_hw, corners)
    expected = [1]
    for low, high, k, size in (
        (y1, y2, output_size[0], size_hw[0]),
        (x1, x2, output_size[1], size_hw[1]),
    ):
        along = bins_along(low, high, scale, k, size, corners)
        expected += [each.start for each in along] + [each.stop for each in along]
    if max(map(abs, box)) < 1e6:
        assert bins.tolist() == [expected]
    assert bins.dtype == torch.int32
    assert bins.is_contiguous()
    assert bins.shape == (1, len(expected))
    assert (bins[:, 1:] >= 0).all()
    assert bins[:, 1:].max() <= max(size_hw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_half_away_from_zero_and_exact(dtype: torch.dtype) -> None:
    below_half = float(torch.nextafter(torch.tensor(0.5, dtype=dtype), torch.tensor(0.0).to(dtype)))
    values = [0.5, below_half, -0.5, -below_half, 1.5, 2.5, -2.5, -0.0, 3.0]
    boxes = [[0, v + 10, v, 1e9, 1e9] for v in values]
    regions = locate_regions(torch.tensor(boxes, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype))
    samples, _ = make_samples("mxnet", regions, (1, 1), 1.0, (99, 99), 1)
    assert (samples[:, 1] + 0.5).tolist() == [half_away(v) for v in values]
    odd = regions_of([[0, 8388609, 0, 1e9, 0]], dtype)  # plus 0.5 it is even in float32
    assert make_bins(odd, (1, 1), 1.0, (1, 2**24)).tolist() == [[0, 0, 1, 8388609, 2**24]]


GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins_use_a_true_division(dtype: type[np.floating[Any]], device: str) -> None:
    """49 * (1/7) is above 7 in float32, as a GPU computes a division by a scalar."""
    sizes = torch.arange(1, 65, dtype=torch.float64)
    boxes = torch.zeros(64, 5, dtype=torch.float64)
    boxes[:, 3] = boxes[:, 4] = sizes
    boxes = boxes.to(device)
    map = torch.zeros(1, 1, 1, 1, dtype=torch.from_numpy(np.zeros(1, dtype)).dtype, device=device)
    bins = make_bins(locate_regions(boxes, map), (7, 7), 1.0, (99, 99), "torchvision").tolist()
    for n, row in zip(range(1, 65), bins, strict=True):
        edges = [dtype(i) * (dtype(n) / dtype(7)) for i in range(8)]
        begins = [math.floor(edge) for edge in edges[:-1]]
        ends = [math.ceil(edge) for edge in edges[1:]]
        assert row[1:15] == begins + ends == row[15:]
        if n % 7 == 0:
            assert begins + ends == [i * n // 7 for i in (*range(7), *range(1, 8))]


@pytest.mark.parametrize("corners", CORNERS)
def test_products_and_sums_are_rounded_as_in_float32(corners: Corners | None) -> None:
    """Computations in float64, which prevent fusion by compilers, have the bits of float32."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2000, 4, generator=generator) * 60
    boxes = torch.cat([torch.zeros(2000, 1), corner.round(decimals=1)], 1)
    regions = locate_regions(boxes, torch.zeros(1, 1, 1, 1))
    bins = make_bins(regions, (7, 7), 0.0625, (9, 9), corners)
    expected = []
    for _, _, y1, _, y2 in boxes.tolist():
        f, scale = np.float32, np.float32(0.0625)
        if corners == "rfcn":
            start = f(half_away(y1)) * scale
            size = max(f(half_away(y2) + 1) * scale - start, f(0.1))
            edges = [f(i) * (size / f(7)) + start for i in range(8)]
        else:
            start = f(half_away(y1 * 0.0625))
            size = f(half_away(y2 * 0.0625)) - start + f(corners is None)
            edges = [f(i) * (max(size, f(1)) / f(7)) for i in range(8)]
        offset = 0 if corners == "rfcn" else int(start)
        begins = [min(max(math.floor(edge) + offset, 0), 9) for edge in edges[:-1]]
        ends = [min(max(math.ceil(edge) + offset, 0), 9) for edge in edges[1:]]
        expected.append(begins + ends)
    assert bins[:, 1:15].tolist() == expected


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [1, 2, 3, 4])
@pytest.mark.parametrize("corners", CORNERS)
def test_nonfinite_box_has_no_image(bad: float, place: int, corners: Corners | None) -> None:
    box = [1.0, 2, 2, 6, 6]
    box[place] = bad
    regions = regions_of([box, [1, 2, 2, 6, 6]])
    assert regions.image.tolist() == [-1, 1]
    assert make_bins(regions, (2, 2), 1.0, (9, 9), corners)[:, 0].tolist() == [-1, 1]
    for mode in MODES:
        samples, size = make_samples(mode, regions, (2, 2), 1.0, (9, 9), 0)
        assert samples[:, 0].tolist() == [-1, 1]
        assert samples.isfinite().all()
        assert size.isfinite().all()


def test_wrong_batch_index_makes_a_box_invalid() -> None:
    """As under torch.compile and in CUDA graphs, where indices are not checked."""
    boxes = [[index, 1, 1, 3, 3] for index in (0.0, 1, 2, -1, 0.5, NAN, INF, 1e30)]
    assert regions_of(boxes).image.tolist() == [0, 1, -1, -1, -1, -1, -1, -1]


def test_list_of_boxes_equals_a_tensor_with_indices() -> None:
    one, two = torch.rand(3, 4), torch.rand(2, 4)
    input = torch.zeros(3, 1, 4, 4)
    index = torch.tensor([0.0, 0, 0, 2, 2])[:, None]
    expected = locate_regions(torch.cat([index, torch.cat([one, two])], 1), input)
    torch.testing.assert_close(locate_regions([one, one[:0], two], input), expected, rtol=0, atol=0)
    assert locate_regions([], input[:0]).low.shape == (0, 2)


def test_batch_indices_of_a_list_are_exact_in_low_precision() -> None:
    boxes = [torch.ones(1, 4, dtype=torch.bfloat16)] * 300
    regions = locate_regions(boxes, torch.zeros(300, 1, 1, 1, dtype=torch.bfloat16))
    assert regions.image.tolist() == list(range(300))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_positions_are_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    input = torch.zeros(1, 1, 2, 2, dtype=dtype)
    assert position_dtype(input) == expected
    regions = locate_regions(torch.ones(1, 5).mul(0).half(), input)
    samples, size = make_samples("mmcv", regions, (2, 2), 1.0, (2, 2), 1)
    shift = make_shift(torch.ones(1, 2, 2, 2, dtype=torch.bfloat16), size, 0.1)
    assert {samples.dtype, size.dtype, shift.dtype} == {expected}


def test_huge_maps_keep_bins_inside() -> None:
    """In float32, 2^24 + 3 is rounded up, outside the map."""
    size = 2**24 + 3
    regions = regions_of([[0, 0, 0, 1e30, 1e30]], torch.float32)
    assert make_bins(regions, (1, 1), 1.0, (size, 1)).tolist() == [[0, 0, size, 0, 1]]


@few
@given(
    box=st.lists(st.floats(-30, 50), min_size=4, max_size=4),
    scale=st.sampled_from([1.0, 0.25, 0.37]),
    output_size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    ratio=st.integers(0, 3),
    mode=st.sampled_from(MODES),
)
def test_samples_equal_the_formula(
    box: list[float], scale: float, output_size: tuple[int, int], ratio: int, mode: Mode
) -> None:
    size_hw = (11, 13)
    samples, size = make_samples(mode, regions_of([[1, *box]]), output_size, scale, size_hw, ratio)
    expected: list[float] = [1]
    sizes = []
    for axis in (0, 1):
        low, high, k = box[1 - axis], box[3 - axis], output_size[axis]
        along, length = samples_along(mode, low, high, scale, k, size_hw[axis], ratio)
        for part in zip(*along, strict=True):  # the firsts, the steps, the counts
            expected += part
        sizes.append(length)
    torch.testing.assert_close(samples, torch.tensor([expected], dtype=torch.float64))
    torch.testing.assert_close(size, torch.tensor([sizes], dtype=torch.float64))
    assert samples.is_contiguous()


def test_shift_is_x_by_the_width_and_y_by_the_height() -> None:
    offset = torch.tensor([[1.0, 2.0, 3.0, 4.0]])[:, :, None, None].requires_grad_()
    size = torch.tensor([[10.0, 100.0]])  # (height, width)
    shift = make_shift(offset, size, 0.5)
    torch.testing.assert_close(shift.flatten(), torch.tensor([50.0, 10.0, 150.0, 20.0]))
    (gradient,) = torch.autograd.grad(shift.sum(), offset)
    torch.testing.assert_close(gradient.flatten(), torch.tensor([50.0, 5.0, 50.0, 5.0]))


def test_boxes_get_no_gradient() -> None:
    boxes = torch.rand(3, 5).floor().requires_grad_()
    regions = locate_regions(boxes, torch.zeros(1, 1, 4, 4))
    assert not any(tensor.requires_grad for tensor in regions)
    for each in locate_regions([boxes[:, 1:]], torch.zeros(1, 1, 4, 4)):
        assert not each.requires_grad
