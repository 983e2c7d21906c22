from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcnseg.ops import (
    deform_ps_roi_pool,
    deform_roi_pool,
    roi_avg_pool,
    roi_pool,
)
from dcnseg.ops.roi import gather as roi_gather
from dcnseg.ops.roi import reference as roi_reference
from dcnseg.ops.roi.checks import Mode

BOXES = torch.tensor(
    [[0, -2.0, 1, 9, 12], [1, 0, 0, 4, 5], [1, 30, 30, 40, 40], [0, 3, 2, 3, 2], [1, 0, 3, 8, 6]],
    dtype=torch.float64,
)


def make_map() -> Tensor:
    return torch.randn(2, 4, 7, 8, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("elements", [1, 400])
@pytest.mark.parametrize("mode", ["paper", "mmcv", "mxnet"])
def test_chunks_have_no_effect(monkeypatch: pytest.MonkeyPatch, mode: Mode, elements: int) -> None:
    input, offset = make_map(), torch.randn(5, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        moved = deform_roi_pool(input, BOXES, offset, (2, 3), mode=mode, backend="reference")
        largest = roi_pool(input, BOXES, (2, 3), backend="reference")
        mean = roi_avg_pool(input, BOXES, (2, 3), backend="reference")
        outputs = [moved, largest, mean]
        total = sum((i + 1) * output.square().sum() for i, output in enumerate(outputs))
        assert isinstance(total, Tensor)
        return [*outputs, *torch.autograd.grad(total, (input, offset))]

    expected = run()
    monkeypatch.setattr(roi_gather, "_CHUNK_ELEMENTS", elements)
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-12)


def test_chunks_gather_no_more_than_allowed() -> None:
    rows = torch.tensor([[3, 4], [1, 1], [9, 2], [0, 0], [2, 2]])
    columns = torch.tensor([[2, 2], [5, 1], [9, 9], [0, 0], [2, 1]])
    allowed = roi_gather._CHUNK_ELEMENTS
    chunks = list(roi_gather._chunks(rows, columns, allowed // 50))
    assert chunks == [(0, 2), (2, 3), (3, 5)]  # 2*4*5 = 40; 9*9, alone; 2*2*2
    assert list(roi_gather._chunks(rows[:0], columns[:0], 1)) == [(0, 0)]


def test_memory_of_the_forward_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 boxes that would need 200 MB at once."""
    monkeypatch.setattr(roi_gather, "_CHUNK_ELEMENTS", 1 << 16)
    sizes: list[int] = []
    gather = roi_gather.gather

    def record(*arguments: object) -> Tensor:
        values = gather(*arguments)  # type: ignore[arg-type]
        sizes.append(values.numel())
        return values

    monkeypatch.setattr(roi_reference, "gather", record)
    boxes = torch.tensor([0.0, 0, 0, 15, 15]).expand(1000, 5)
    output = roi_avg_pool(torch.ones(1, 64, 16, 16), boxes, 2, backend="reference")
    assert (output == 1).all()
    assert max(sizes) <= 1 << 16


@pytest.mark.parametrize(("mode", "samples"), [("paper", 4), ("mxnet", 2)])
def test_has_a_second_derivative(mode: Mode, samples: int) -> None:
    input = torch.randn(1, 2, 4, 4, dtype=torch.float64).requires_grad_()
    offset = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0, 0.0, 1, 3, 3], [0, -1, 0, 1, 9]], dtype=torch.float64)

    def run(input: Tensor, offset: Tensor) -> Tensor:
        return deform_ps_roi_pool(
            input, boxes, offset, (1, 2), mode=mode, samples_per_part=samples, backend="reference"
        )

    assert torch.autograd.gradgradcheck(run, (input, offset))


def test_gradients_of_low_precision_are_summed_in_float32() -> None:
    """1000 boxes on one pixel; in bfloat16, 256 + 1 = 256."""
    input = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    boxes = torch.zeros(1000, 5)
    for pool in (roi_pool, roi_avg_pool):
        output = pool(input, boxes, 1, backend="reference")
        (gradient,) = torch.autograd.grad(output.sum(), input)
        assert gradient.item() == 1000
