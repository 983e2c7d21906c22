from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcnseg.ops import deform_conv2d
from dcnseg.ops.deform_conv import reference


def make_leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 6, 5), (2, 36, 6, 5), (3, 4, 3, 3), (3,), (2, 18, 6, 5))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def convolve(leaves: list[Tensor]) -> Tensor:
    input, offset, weight, bias, mask = leaves
    return deform_conv2d(input, offset, weight, bias, 1, 1, 1, mask, backend="reference")


def test_tiles_of_one_row_give_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = make_leaves()
    untiled = convolve(leaves)
    monkeypatch.setattr(reference, "_TILE_ELEMENTS", 1)
    tiled = convolve(leaves)
    torch.testing.assert_close(tiled, untiled)
    grad = torch.randn_like(untiled)
    torch.testing.assert_close(
        torch.autograd.grad(tiled, leaves, grad), torch.autograd.grad(untiled, leaves, grad)
    )


def test_tiles_keep_no_samples_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory saved for the backward must not grow with taps times channels."""
    monkeypatch.setattr(reference, "_TILE_ELEMENTS", 1)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    leaves = make_leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        convolve(leaves)
    samples = 2 * 6 * 5 * 4 * 9
    assert saved
    assert max(saved) <= samples / 6  # one row of samples


def test_second_derivative() -> None:
    leaves = make_leaves()[:3]
    small = [leaves[0][:1, :1, :2, :2], leaves[1][:1, :18, :2, :2], leaves[2][:1, :1]]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in small]

    def run(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return deform_conv2d(input, offset, weight, None, 1, 1, backend="reference")

    assert torch.autograd.gradgradcheck(run, inputs)


def test_large_maps_keep_exact_indices() -> None:
    """Indices of 4097 * 4097 pixels exceed 2^24, where float32 is not exact."""
    input = torch.zeros(1, 1, 4097, 4097)
    input[0, 0, -1, -2] = 1.0
    offset = torch.tensor([4096.0, 4095.0]).view(1, 2, 1, 1)
    output = deform_conv2d(input, offset, torch.ones(1, 1, 1, 1), stride=4097, backend="reference")
    assert float(output) == 1.0
