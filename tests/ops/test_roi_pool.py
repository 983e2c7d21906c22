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
from tests.ops.roi_cases import (
    BAD_BOXES,
    FINITE_BOXES,
    NEAR_BOXES,
    bins_along,
    random_boxes_within,
    random_map,
)

NAN, INF = math.nan, math.inf
KINDS = ["max", "avg", "ps", "ps rfcn"]
CORNERS: dict[str, Corners] = {"ps": "torchvision", "ps rfcn": "rfcn"}

# On a map of 7x9 (height x width), at a scale of 0.5.
BOXES: list[list[float]] = [
    *FINITE_BOXES,
    [0, -1e30, -1e30, 1e30, 1e30],
    [1, 0, 0, 1e30, 6],
    [0, -1e300, 5, 1e300, 1e300],
    [0, 1e30, 0, 1e30, 10],
    *BAD_BOXES,
]


def loop_oracle(input: Tensor, boxes: Tensor, output_size: tuple[int, int], kind: str) -> Tensor:
    """The formula, one output value at a time; max: NaN if there is one, else the maximum."""
    kh, kw = output_size
    channels = input.shape[1] // (kh * kw if kind.startswith("ps") else 1)
    output = torch.zeros(len(boxes), channels, kh, kw, dtype=torch.float64)
    for r, (image, x1, y1, x2, y2) in enumerate(boxes.tolist()):
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            output[r] = NAN
            continue
        rows = bins_along(y1, y2, 0.5, kh, input.shape[2], CORNERS.get(kind))
        columns = bins_along(x1, x2, 0.5, kw, input.shape[3], CORNERS.get(kind))
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
    return ps_roi_pool(input, boxes, output_size, 0.5, corners=CORNERS[kind], backend=backend)


def random_boxes(count: int, seed: int = 0, inside: bool = False) -> Tensor:
    """Boxes around a map of 7x9 at a scale of 0.5, some partly outside."""
    low, span = (0, (12, 8, 12, 8)) if inside else (-6, (26, 22, 30, 26))
    return random_boxes_within(count, low, span, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output_size", [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("size_hw", [(7, 9), (1, 1)])
@pytest.mark.parametrize("has_nan", [False, True])
def test_equals_loops(
    kind: str, output_size: tuple[int, int], size_hw: tuple[int, int], has_nan: bool,
    backend: Backend,
) -> None:  # fmt: skip
    input = random_map(24 if kind.startswith("ps") else 3, size_hw)
    if has_nan:
        input[0, :, size_hw[0] // 2, size_hw[1] // 2] = NAN
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
