from __future__ import annotations

import math

import pytest
import torch
import torchvision.ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.ops import ps_roi_pool, roi_avg_pool, roi_pool
from dcnseg.ops.backend import Backend
from dcnseg.ops.roi.checks import Corners
from tests.ops.common import round_half_away as half_away
from tests.ops.roi_cases import (
    BAD_BOXES,
    FINITE_BOXES,
    NEAR_BOXES,
    random_boxes_within,
    random_map,
)

NAN, INF = math.nan, math.inf
KINDS = ["max", "avg", "ps", "ps rfcn"]

# On a map of 7x9 (height x width), at a scale of 0.5.
BOXES: list[list[float]] = [
    *FINITE_BOXES,
    [0, -1e30, -1e30, 1e30, 1e30],
    [1, 0, 0, 1e30, 6],
    [0, 1e30, 0, 1e30, 10],
    *BAD_BOXES,
]


def bins_along(low: float, high: float, k: int, size: int, kind: str) -> list[range]:
    """The pixels of each of k bins, at a scale of 0.5."""
    if kind == "ps rfcn":
        start = half_away(low) * 0.5
        length = max((half_away(high) + 1) * 0.5 - start, 0.1)
        edges = [(math.floor(i * length / k + start), math.ceil((i + 1) * length / k + start))
                 for i in range(k)]  # fmt: skip
    else:
        first = half_away(low * 0.5)
        end = half_away(high * 0.5) + (0 if kind == "ps" else 1)
        size_of_bin = max(end - first, 1) / k
        edges = [(math.floor(i * size_of_bin) + first, math.ceil((i + 1) * size_of_bin) + first)
                 for i in range(k)]  # fmt: skip
    return [range(min(max(a, 0), size), min(max(b, 0), size)) for a, b in edges]


def loop_oracle(input: Tensor, boxes: Tensor, output_size: tuple[int, int], kind: str) -> Tensor:
    """The formula, one output value at a time; max: NaN if there is one, else the maximum."""
    kh, kw = output_size
    channels = input.shape[1] // (kh * kw if kind.startswith("ps") else 1)
    output = torch.zeros(len(boxes), channels, kh, kw, dtype=torch.float64)
    for r, (image, x1, y1, x2, y2) in enumerate(boxes.tolist()):
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            output[r] = NAN
            continue
        rows = bins_along(y1, y2, kh, input.shape[2], kind)
        columns = bins_along(x1, x2, kw, input.shape[3], kind)
        for c, i, j in torch.cartesian_prod(*map(torch.arange, output.shape[1:])).tolist():
            channel = (c * kh + i) * kw + j if kind.startswith("ps") else c
            plane = input[int(image), channel].tolist()
            values = [plane[y][x] for y in rows[i] for x in columns[j]]
            if not values:
                continue
            maximum = NAN if any(map(math.isnan, values)) else max(values)
            output[r, c, i, j] = maximum if kind == "max" else sum(values) / len(values)
    return output


def pool(
    kind: str, input: Tensor, boxes: Tensor, output_size: tuple[int, int], backend: Backend
) -> Tensor:
    """One of the operators at a scale of 0.5."""
    if kind == "max":
        return roi_pool(input, boxes, output_size, 0.5, backend=backend)
    if kind == "avg":
        return roi_avg_pool(input, boxes, output_size, 0.5, backend=backend)
    corners: Corners = "rfcn" if kind == "ps rfcn" else "torchvision"
    return ps_roi_pool(input, boxes, output_size, 0.5, corners=corners, backend=backend)


def random_boxes(count: int, seed: int = 0, inside: bool = False) -> Tensor:
    """Boxes around a map of 7x9 at a scale of 0.5, some partly outside."""
    low, span = (0, (12, 8, 12, 8)) if inside else (-6, (26, 22, 30, 26))
    return random_boxes_within(count, low, span, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output_size", [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("size_hw", [(7, 9), (1, 1)])
def test_equals_loops(
    kind: str, output_size: tuple[int, int], size_hw: tuple[int, int], backend: Backend
) -> None:
    input = random_map(24 if kind.startswith("ps") else 3, size_hw)
    boxes = torch.cat([torch.tensor(BOXES, dtype=torch.float64), random_boxes(12)])
    expected = loop_oracle(input, boxes, output_size, kind)
    output = pool(kind, input, boxes, output_size, backend)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_max_equals_torchvision_values_and_gradients(dtype: torch.dtype, backend: Backend) -> None:
    finite = torch.tensor(
        [box for box in BOXES if all(abs(v) < 1e6 for v in box)], dtype=torch.float64
    )
    boxes = torch.cat([finite, random_boxes(40)]).to(dtype)
    input = random_map(3).to(dtype).requires_grad_()
    output = roi_pool(input, boxes, (3, 2), 0.5, backend=backend)
    expected = torchvision.ops.roi_pool(input, boxes, (3, 2), 0.5)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    grad = torch.randn_like(expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, input, grad) for y in (output, expected))
    torch.testing.assert_close(ours, theirs)


def test_position_sensitive_equals_torchvision_away_from_the_far_edge(backend: Backend) -> None:
    boxes = random_boxes(40, inside=True)
    input = random_map(24).requires_grad_()
    output = ps_roi_pool(input, boxes, (3, 2), 0.5, backend=backend)
    expected = torchvision.ops.ps_roi_pool(input, boxes, (3, 2), 0.5)
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, input, grad) for y in (output, expected))
    torch.testing.assert_close(ours, theirs)


def test_position_sensitive_includes_the_last_row_and_column(backend: Backend) -> None:
    """The forward of torchvision excludes them, its backward does not."""
    input = torch.zeros(1, 1, 3, 4, requires_grad=True)
    with torch.no_grad():
        input[0, 0, 2, :] = input[0, 0, :, 3] = 12.0
    boxes = torch.tensor([[0.0, 0, 0, 4, 3]])
    output = ps_roi_pool(input, boxes, 1, backend=backend)
    assert output.item() == 6.0  # 6 of 12 pixels
    assert torchvision.ops.ps_roi_pool(input, boxes, 1).item() == 0.0
    (gradient,) = torch.autograd.grad(output.sum(), input)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / 12))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, backend: Backend) -> None:
    input = random_map(6 if kind.startswith("ps") else 2, (5, 6)).requires_grad_()
    boxes = torch.cat([torch.tensor(BOXES[:10], dtype=torch.float64), random_boxes(4)])
    assert torch.autograd.gradcheck(lambda input: pool(kind, input, boxes, (3, 2), backend), input)


def test_first_of_several_maxima_gets_the_gradient(backend: Backend) -> None:
    input = torch.zeros(1, 1, 3, 4, requires_grad=True)
    with torch.no_grad():
        input[0, 0, 1, 2] = input[0, 0, 1, 3] = input[0, 0, 2, 0] = 5.0
    boxes = torch.tensor([[0.0, 0, 0, 9, 9], [0, 0, 2, 9, 9]])
    output = roi_pool(input, boxes, 1, backend=backend)
    (gradient,) = torch.autograd.grad(output, input, torch.tensor([1.0, 10.0]).view(2, 1, 1, 1))
    expected = torch.zeros(3, 4)
    expected[1, 2], expected[2, 0] = 1.0, 10.0
    torch.testing.assert_close(gradient[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_max_of_minus_infinity(dtype: torch.dtype, backend: Backend) -> None:
    input = torch.full((1, 2, 3, 4), -INF, dtype=dtype, requires_grad=True)
    boxes = torch.tensor([[0.0, 1, 1, 9, 9]], dtype=dtype)
    output = roi_pool(input, boxes, 1, backend=backend)
    assert (output == -INF).all()
    (gradient,) = torch.autograd.grad(output.sum(), input)
    expected = torch.zeros_like(input)
    expected[:, :, 1, 1] = 1
    torch.testing.assert_close(gradient, expected)


def test_first_nan_is_the_maximum_and_gets_the_gradient(backend: Backend) -> None:
    input = torch.randn(1, 1, 4, 4)
    input[0, 0, 1, 3] = input[0, 0, 2, 0] = NAN
    input[0, 0, 0, 0] = INF
    input.requires_grad_()
    output = roi_pool(input, torch.tensor([[0.0, 0, 0, 9, 9]]), 1, backend=backend)
    assert output.isnan().all()
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert gradient.flatten().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("kind", KINDS)
def test_nan_affects_only_the_bins_that_read_it(kind: str, backend: Backend) -> None:
    input = random_map(24)
    boxes = torch.cat([torch.tensor(BOXES, dtype=torch.float64), random_boxes(20)])
    good = [i for i, box in enumerate(boxes.tolist()) if all(map(math.isfinite, box))]
    boxes = boxes[good]
    clean = pool(kind, input, boxes, (3, 2), backend)
    broken = input.clone()
    broken[0, :, 3, 4] = NAN
    expected = loop_oracle(broken, boxes, (3, 2), kind).isnan()
    output = pool(kind, broken, boxes, (3, 2), backend)
    torch.testing.assert_close(output.isnan(), expected)
    assert expected.any()
    assert not expected.all()
    torch.testing.assert_close(output[~expected], clean[~expected], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nonfinite_box_gives_nan_and_no_gradient(kind: str, bad: float, backend: Backend) -> None:
    input = random_map(24).requires_grad_()
    boxes = random_boxes(4, inside=True)
    alone = boxes[[0, 1, 3]]
    boxes[2, 3] = bad
    output = pool(kind, input, boxes, (3, 2), backend)
    assert output[2].isnan().all()
    assert output[[0, 1, 3]].isfinite().all()
    (ours,) = torch.autograd.grad(output.sum(), input)
    (theirs,) = torch.autograd.grad(pool(kind, input, alone, (3, 2), backend).sum(), input)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "regions", "channels"), [(2, 0, 24), (0, 0, 24), (2, 3, 0)])
def test_empty_arguments(
    kind: str, batch: int, regions: int, channels: int, backend: Backend
) -> None:
    input = torch.zeros(batch, channels, 5, 6, requires_grad=True)
    output = pool(kind, input, torch.zeros(regions, 5), (3, 2), backend)
    assert output.shape == (regions, channels // (6 if kind.startswith("ps") else 1), 3, 2)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert gradient.shape == input.shape
    assert not gradient.any()


# Maps of small integers: many equal values, and sums that are exact in every order.
maps = st.builds(
    lambda seed, height, width: torch.randint(
        -4, 5, (2, 12, height, width), generator=torch.Generator().manual_seed(seed)
    ).double(),
    st.integers(0, 9),
    st.integers(1, 8),
    st.integers(1, 8),
)
sizes = st.sampled_from([(1, 1), (2, 3), (3, 2), (4, 1)])
few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(input=maps, boxes=NEAR_BOXES, output_size=sizes, kind=st.sampled_from(KINDS))
def test_generated_boxes_equal_loops(
    backend: Backend, input: Tensor, boxes: Tensor, output_size: tuple[int, int], kind: str
) -> None:
    expected = loop_oracle(input, boxes, output_size, kind)
    output = pool(kind, input, boxes, output_size, backend)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@few
@given(input=maps, boxes=NEAR_BOXES, output_size=sizes, kind=st.sampled_from(KINDS[1:]))
def test_means_are_linear_and_preserve_constants(
    backend: Backend, input: Tensor, boxes: Tensor, output_size: tuple[int, int], kind: str
) -> None:
    other = input.flip(0, 1, 2) - 1
    both = pool(kind, input + 3 * other, boxes, output_size, backend)
    apart = pool(kind, input, boxes, output_size, backend) + 3 * pool(
        kind, other, boxes, output_size, backend
    )
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-12)
    constant = pool(kind, torch.full_like(input, 2.5), boxes, output_size, backend)
    assert ((constant == 2.5) | (constant == 0)).all()  # 0: the bin is outside


@few
@given(input=maps, boxes=NEAR_BOXES, output_size=st.sampled_from([(2, 3), (3, 2), (4, 1)]))
def test_position_sensitive_bins_select_channels(
    backend: Backend, input: Tensor, boxes: Tensor, output_size: tuple[int, int]
) -> None:
    kh, kw = output_size
    output = ps_roi_pool(input, boxes, output_size, 0.5, backend=backend)
    for i in range(kh):
        for j in range(kw):
            repeated = input[:, i * kw + j :: kh * kw].repeat_interleave(kh * kw, 1)
            whole = ps_roi_pool(repeated, boxes, output_size, 0.5, backend=backend)
            torch.testing.assert_close(output[:, :, i, j], whole[:, :, i, j])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_other_dtypes_of_boxes_have_no_effect(kind: str, backend: Backend) -> None:
    input = random_map(24).float()
    boxes = (random_boxes(8) * 4).round() / 4
    boxes[:, 0] = boxes[:, 0].floor()
    size = (4, 2) if kind == "max" else (2, 3)
    expected = pool(kind, input, boxes, size, backend)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", torch.bfloat16):
            output = pool(kind, input, boxes.to(dtype), size, backend)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_list_of_boxes_is_the_tensor_with_indices(kind: str, backend: Backend) -> None:
    input, boxes = random_map(24), random_boxes(9)
    boxes = boxes[boxes[:, 0].argsort()]
    parts = [boxes[boxes[:, 0] == image][:, 1:] for image in (0, 1)]
    torch.testing.assert_close(
        pool(kind, input, parts, (3, 2), backend),  # type: ignore[arg-type]
        pool(kind, input, boxes, (3, 2), backend),
        rtol=0,
        atol=0,
    )
