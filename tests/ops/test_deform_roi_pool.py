from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.ops import deform_ps_roi_pool, deform_roi_pool, roi_avg_pool
from dcnseg.ops.backend import Backend
from dcnseg.ops.roi.checks import Mode
from tests.ops.roi_cases import (
    BAD_BOXES,
    FINITE_BOXES,
    NEAR_BOXES,
    random_boxes_within,
    random_map,
    samples_along,
)

NAN, INF = math.nan, math.inf
MODES: list[Mode] = ["paper", "mmcv", "mxnet"]
SCALE, GAMMA = 0.5, 0.3

BOXES = [*FINITE_BOXES, *BAD_BOXES]


def is_inside(mode: str, v: float, size: int) -> bool:
    if mode == "mmcv":
        return -1 <= v <= size
    return -0.5 <= v <= size - 0.5


def sample(plane: Tensor, y: float, x: float, mode: str) -> float:
    """Sum over all pixels q of G(q, p) * value(q), with the border of the mode."""
    height, width = plane.shape
    if mode != "paper":
        if not (is_inside(mode, y, height) and is_inside(mode, x, width)):
            return 0.0
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    return sum(
        max(0.0, 1 - abs(qy - y)) * max(0.0, 1 - abs(qx - x)) * float(plane[qy, qx])
        for qy in range(max(0, math.floor(y)), min(height, math.floor(y) + 2))
        for qx in range(max(0, math.floor(x)), min(width, math.floor(x) + 2))
    )


def loop_oracle(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    mode: str,
    ratio: int = 0,
    group_size: tuple[int, int] = (1, 1),
) -> Tensor:
    """The documented formula, one output value at a time."""
    (kh, kw), (gh, gw) = output_size, group_size
    channels = input.shape[1] // (gh * gw)
    size_hw = (input.shape[2], input.shape[3])
    output = torch.zeros(len(boxes), channels, kh, kw, dtype=torch.float64)
    if offset is None:
        offset = torch.zeros(len(boxes), 2, kh, kw)
    classes, ph, pw = offset.shape[1] // 2, *offset.shape[2:]
    for r, (image, x1, y1, x2, y2) in enumerate(boxes.tolist()):
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            output[r] = NAN
            continue
        rows, height = samples_along(mode, y1, y2, SCALE, kh, size_hw[0], ratio)
        columns, width = samples_along(mode, x1, x2, SCALE, kw, size_hw[1], ratio)
        for c, i, j in torch.cartesian_prod(*map(torch.arange, output.shape[1:])).tolist():
            plane = input[int(image), (c * gh + i * gh // kh) * gw + j * gw // kw]
            part = 2 * (c * classes // channels), i * ph // kh, j * pw // kw
            dx = GAMMA * width * float(offset[r, part[0], part[1], part[2]])
            dy = GAMMA * height * float(offset[r, part[0] + 1, part[1], part[2]])
            (first_y, step_y, count_y), (first_x, step_x, count_x) = rows[i], columns[j]
            points = [
                (first_y + n * step_y + dy, first_x + m * step_x + dx)
                for n in range(count_y)
                for m in range(count_x)
            ]
            if mode == "mxnet":
                points = [
                    (y, x)
                    for y, x in points
                    if is_inside(mode, y, size_hw[0]) and is_inside(mode, x, size_hw[1])
                ]
            total = sum(sample(plane, y, x, mode) for y, x in points)
            output[r, c, i, j] = total / max(len(points), 1)
    return output


def random_boxes(count: int, seed: int = 0) -> Tensor:
    return random_boxes_within(count, -4, (24, 20, 24, 20), seed)


def random_offset(regions: int, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 0.7 * torch.randn(regions, *size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("output_size", [(1, 1), (2, 3)])
@pytest.mark.parametrize("size_hw", [(7, 9), (1, 1)])
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize(
    ("mode", "ratio"), [("paper", 0), ("mmcv", 0), ("mmcv", 2), ("mxnet", 0), ("mxnet", 3)]
)
def test_equals_loops(
    mode: Mode,
    ratio: int,
    moved: bool,
    output_size: tuple[int, int],
    size_hw: tuple[int, int],
    backend: Backend,
) -> None:
    input = random_map(2, size_hw)
    boxes = torch.cat([torch.tensor(BOXES, dtype=torch.float64), random_boxes(5)])
    offset = random_offset(len(boxes), 2, *output_size) if moved else None
    output = deform_roi_pool(
        input, boxes, offset, output_size, SCALE, GAMMA, mode=mode, sampling_ratio=ratio,
        backend=backend,
    )  # fmt: skip
    expected = loop_oracle(input, boxes, offset, output_size, mode, ratio)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("mode", "samples"), [("paper", 4), ("mxnet", 2)])
@pytest.mark.parametrize(
    ("output_size", "group_size", "part_size", "classes"),
    [
        ((2, 3), None, None, 1),
        ((2, 3), (1, 2), (3, 2), 2),
        ((3, 3), (2, 2), (1, 1), 4),
        ((1, 2), (2, 3), None, 2),
    ],
)
def test_position_sensitive_equals_loops(
    output_size: tuple[int, int],
    group_size: tuple[int, int] | None,
    part_size: tuple[int, int] | None,
    classes: int,
    mode: Mode,
    samples: int,
    backend: Backend,
) -> None:
    groups = group_size or output_size
    input = random_map(4 * math.prod(groups))
    boxes = torch.cat([torch.tensor(BOXES, dtype=torch.float64), random_boxes(3)])
    offset = random_offset(len(boxes), 2 * classes, *(part_size or output_size))
    output = deform_ps_roi_pool(
        input, boxes, offset, output_size, SCALE, GAMMA, group_size=group_size,
        part_size=part_size, samples_per_part=samples, mode=mode, backend=backend,
    )  # fmt: skip
    expected = loop_oracle(input, boxes, offset, output_size, mode, samples, groups)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("mode", "ratio"), [("paper", 0), ("mmcv", 0), ("mmcv", 2), ("mxnet", 0)])
def test_gradcheck(mode: Mode, ratio: int, backend: Backend) -> None:
    input = random_map(2, (4, 5)).requires_grad_()
    boxes = torch.tensor(BOXES[:6], dtype=torch.float64)
    offset = random_offset(6, 2, 2, 2).requires_grad_()

    def pool(input: Tensor, offset: Tensor) -> Tensor:
        return deform_roi_pool(
            input, boxes, offset, 2, SCALE, GAMMA, mode=mode, sampling_ratio=ratio, backend=backend
        )

    assert torch.autograd.gradcheck(pool, (input, offset))


@pytest.mark.parametrize(("mode", "samples"), [("paper", 4), ("mxnet", 2)])
def test_position_sensitive_gradcheck(mode: Mode, samples: int, backend: Backend) -> None:
    input = random_map(4, (3, 4)).requires_grad_()
    boxes = torch.tensor([BOXES[i] for i in (0, 1, 4)], dtype=torch.float64)
    offset = random_offset(3, 4, 1, 3).requires_grad_()

    def pool(input: Tensor, offset: Tensor) -> Tensor:
        return deform_ps_roi_pool(
            input, boxes, offset, (3, 2), SCALE, GAMMA, group_size=(1, 2), part_size=(1, 3),
            samples_per_part=samples, mode=mode, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(pool, (input, offset))


def test_first_channel_moves_bins_to_the_right(backend: Backend) -> None:
    """Unlike the convolution, whose first channel moves taps down."""
    input = torch.zeros(1, 1, 3, 4)
    input[0, 0, 1, 3] = 1.0
    boxes = torch.tensor([[0.0, 0, 1, 1, 1]])  # 2 pixels wide, 1 high
    offset = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    for gamma, expected in ((1.0, 0.5), (0.5, 0.0), (0.75, 0.25)):
        output = deform_roi_pool(input, boxes, offset, 1, 1.0, gamma, backend=backend)
        assert output.item() == expected


@pytest.mark.parametrize("axis", [0, 1])
def test_derivative_at_integer_positions_is_right_handed(axis: int, backend: Backend) -> None:
    input, boxes = random_map(3), torch.tensor([[0, 4.0, 4, 12, 10]], dtype=torch.float64)
    offset = torch.zeros(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def total(offset: Tensor) -> Tensor:
        return deform_roi_pool(input, boxes, offset, 2, SCALE, GAMMA, backend=backend).sum()

    (gradient,) = torch.autograd.grad(total(offset), offset)
    step = 1e-4  # the output is linear between integers, so the difference is exact
    moved = offset.detach().clone()
    moved[0, axis, 1, 0] += step
    difference = float(total(moved) - total(offset.detach())) / step
    assert difference == pytest.approx(float(gradient[0, axis, 1, 0]), abs=1e-8)


def test_derivative_one_pixel_outside_is_right_handed(backend: Backend) -> None:
    """As in the convolution: half a pixel to the right, the sample is half of the first pixel."""
    input = torch.full((1, 1, 3, 3), 8.0)
    boxes = torch.tensor([[0.0, 0, 1, 0, 1]])  # one pixel
    offset = torch.tensor([-1.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    output = deform_roi_pool(input, boxes, offset, 1, 1.0, 1.0, backend=backend)
    assert output.item() == 0.0
    (gradient,) = torch.autograd.grad(output.sum(), offset)
    assert gradient.flatten().tolist() == [8.0, 0.0]


@pytest.mark.parametrize("mode", ["mmcv", "mxnet"])
@pytest.mark.parametrize("corner", [-0.4, 4.3])
def test_derivative_across_a_replicated_edge_is_zero(
    mode: Mode, corner: float, backend: Backend
) -> None:
    """One sample outside a 5x5 map along x, between pixels along y."""
    input = random_map(1, (5, 5)).requires_grad_()
    boxes = torch.tensor([[0.0, 2, 2, 2, 2]], dtype=torch.float64)
    start = 2 - 0.5
    if mode == "mmcv":
        boxes[0, 3:] = 3
        start = 2.0
    offset = torch.tensor([corner - start, 0.3], dtype=torch.float64).view(1, 2, 1, 1)
    offset.requires_grad_()
    output = deform_roi_pool(
        input, boxes, offset, 1, 1.0, 1.0, mode=mode, sampling_ratio=1, backend=backend
    )
    input_grad, offset_grad = torch.autograd.grad(output.sum(), (input, offset))
    assert offset_grad[0, 0].item() == 0
    column = 0 if corner < 0 else 4
    row = math.floor(start + 0.3)
    plane = input.detach()[0, 0, :, column]
    assert offset_grad[0, 1].item() == pytest.approx(float(plane[row + 1] - plane[row]))
    assert input_grad[0, 0, :, column].sum().item() == pytest.approx(1)


sizes = st.sampled_from([(1, 1), (2, 3), (3, 2)])
few = settings(max_examples=20, deadline=None, derandomize=True)


@few
@given(boxes=NEAR_BOXES, output_size=sizes, size_hw=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_zero_offset_is_the_average_pooling(
    backend: Backend, boxes: Tensor, output_size: tuple[int, int], size_hw: tuple[int, int]
) -> None:
    input = random_map(6, size_hw)
    expected = roi_avg_pool(input, boxes, output_size, SCALE, backend=backend)
    zero = torch.zeros(len(boxes), 2, *output_size)
    for offset in (zero, None):
        output = deform_roi_pool(input, boxes, offset, output_size, SCALE, backend=backend)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        whole = deform_ps_roi_pool(
            input, boxes, offset, output_size, SCALE, group_size=1, backend=backend
        )
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-12)


@few
@given(boxes=NEAR_BOXES, mode=st.sampled_from(MODES), spread=st.floats(0.1, 3))
def test_generated_boxes_equal_loops(
    backend: Backend, boxes: Tensor, mode: Mode, spread: float
) -> None:
    input, offset = random_map(2), spread * random_offset(len(boxes), 2, 2, 2)
    output = deform_roi_pool(input, boxes, offset, 2, SCALE, GAMMA, mode=mode, backend=backend)
    expected = loop_oracle(input, boxes, offset, (2, 2), mode)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("axis", [0, 1])
def test_nonfinite_offset_gives_nan_in_its_bin_only(
    axis: int, bad: float, mode: Mode, backend: Backend
) -> None:
    input = random_map(3).requires_grad_()
    boxes = torch.tensor([[0, 2.0, 2, 12, 10], [1, 4, 2, 13, 11]], dtype=torch.float64)
    offset = random_offset(2, 2, 2, 3)
    offset[1, axis, 0, 2] = bad
    offset.requires_grad_()
    output = deform_roi_pool(input, boxes, offset, (2, 3), SCALE, GAMMA, mode=mode, backend=backend)
    expected = torch.zeros(2, 3, 2, 3, dtype=torch.bool)
    expected[1, :, 0, 2] = True
    torch.testing.assert_close(output.isnan(), expected)
    input_grad, offset_grad = torch.autograd.grad(output.sum(), (input, offset))
    assert offset_grad[1, :, 0, 2].isnan().all()
    assert int(offset_grad.isnan().sum()) == 2
    assert input_grad.isfinite().all()


def test_bin_without_samples_gives_zero_for_a_nan_offset(backend: Backend) -> None:
    boxes = torch.tensor([[0, 40.0, 40, 60, 60]], dtype=torch.float64)  # outside: empty bins
    offset = torch.full((1, 2, 2, 2), NAN, dtype=torch.float64, requires_grad=True)
    output = deform_roi_pool(random_map(3), boxes, offset, 2, SCALE, backend=backend)
    assert not output.any()
    (gradient,) = torch.autograd.grad(output.sum(), offset)
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", MODES)
@few
@given(
    box=st.lists(
        st.sampled_from([0.0, 5.0, 1e30, -1e30, 3e38, -3e38, 2.0**31, -(2.0**63), NAN, INF]),
        min_size=4,
        max_size=4,
    ),
    shift=st.sampled_from([0.0, 1e9, -1e30, 3e38, -INF, NAN]),
)
def test_no_value_crashes(
    backend: Backend, dtype: torch.dtype, mode: Mode, box: list[float], shift: float
) -> None:
    input = random_map(3).to(dtype).requires_grad_()
    boxes = torch.tensor([[0, *box], [1, 2, 2, 12, 9]], dtype=dtype)
    offset = torch.full((2, 2, 2, 2), shift, dtype=dtype, requires_grad=True)
    output = deform_roi_pool(input, boxes, offset, 2, SCALE, mode=mode, backend=backend)
    torch.autograd.grad(output.sum(), (input, offset))
    still = deform_roi_pool(input, boxes, None, 2, SCALE, mode=mode, backend=backend)
    assert still[1].isfinite().all()
    is_bad = not all(map(math.isfinite, boxes[0].tolist()))
    assert bool(still[0].isnan().all()) == is_bad
    assert bool(still[0].isnan().any()) == is_bad


@pytest.mark.parametrize("mode", MODES)
def test_boxes_of_any_size_read_the_map(mode: Mode, backend: Backend) -> None:
    """A box of 1e30 pixels has as many samples in mode "mmcv", but few read a pixel."""
    input = torch.ones(1, 1, 6, 6, dtype=torch.float64)
    boxes = torch.tensor([[0, 0, 0, 1e30, 1e30], [0, 0, 0, 1e4, 11]], dtype=torch.float64)
    output = deform_roi_pool(input, boxes, None, 1, SCALE, mode=mode, backend=backend)
    expected = {
        "paper": [1.0, 1.0],
        # 5000 x 6 samples in the second box, of which 7 (and 6) are within one pixel of the map
        "mmcv": [0.0, 7 * 6 / (5000 * 6)],
        "mxnet": [1.0, 1.0],
    }[mode]
    assert output.flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("mode", "moved", "size"), [("mmcv", 0.0, 1.0), ("mxnet", 0.25, 2.0)])
def test_derivative_on_the_first_row_and_column_is_right_handed(
    mode: Mode, moved: float, size: float, backend: Backend
) -> None:
    """The only sample is on pixel (0, 0), at the limit of the clamped range."""
    map = torch.arange(36, dtype=torch.float64).square().view(1, 1, 6, 6)
    boxes = torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.float64)
    offset = torch.full((1, 2, 1, 1), moved, dtype=torch.float64, requires_grad=True)
    output = deform_roi_pool(
        map, boxes, offset, 1, 1.0, 1.0, mode=mode, sampling_ratio=1, backend=backend
    )
    (grad,) = torch.autograd.grad(output.sum(), offset)
    assert output.item() == 0
    assert grad.flatten().tolist() == [size * 1, size * 36]


def test_sample_before_the_first_pixel_does_not_read_the_second(backend: Backend) -> None:
    input = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    input[0, 0, 1, :] = input[0, 0, :, 1] = NAN
    offset = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    boxes = torch.tensor([[0, 0.0, 0.0, 0.4, 0.4]], dtype=torch.float64)
    mmcv = deform_roi_pool(
        input, boxes, offset, 1, mode="mmcv", sampling_ratio=1, backend=backend
    )  # a single sample, at -0.3
    mxnet = deform_ps_roi_pool(
        input, boxes, offset, 1, samples_per_part=1, mode="mxnet", backend=backend
    )  # at -0.5
    assert mmcv.item() == mxnet.item() == 1
