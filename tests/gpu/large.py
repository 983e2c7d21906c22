"""Checks of calls whose indices do not fit into 32 bits.

Entry point: `make_large_checks`. Only the last corner of the feature map is compared, and the
gradient is zero elsewhere: the indices are largest there, and the reference needs only a crop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from unittest import SkipTest

import torch
from torch import Tensor

from benchmarks.common import odd_sixteenths
from dcnseg.ops import deform_conv2d, deform_roi_pool, roi_avg_pool, roi_pool
from tests.gpu.checks import Check, require_gpu

CROP = 48  # side of the map's last corner in pixels
CORNER = 24  # side of the outputs compared; samples lie within 5 pixels of them
_ALLOWED = 2e-2  # bfloat16, relative to the largest value


@dataclass(frozen=True)
class LargeConvolution:
    """A convolution of a square map and kernel that keeps size and channels."""

    channels: int
    size: int
    kernel: int
    needed_gib: int  # of GPU memory, forward and backward

    @property
    def columns(self) -> int:
        return self.channels * self.kernel**2 * self.size**2


MANY_COLUMNS = LargeConvolution(64, 1952, 3, 12)
MANY_INPUTS = LargeConvolution(64, 5824, 1, 48)


def make_large_checks() -> Iterator[Check]:
    """Yield checks with many columns, with many input values, and of region pooling."""
    for name, large in (("columns", MANY_COLUMNS), ("input values", MANY_INPUTS)):
        yield Check(f"more than 2^31 {name}", partial(check_convolution, large=large))
    yield Check("regions of more than 2^31 input values", check_regions)


def check_convolution(device: torch.device, large: LargeConvolution) -> str:
    require_memory(device, large.needed_gib)
    input, offset, weight = make_tensors(large, device)
    leaves = [tensor.requires_grad_() for tensor in (input, offset, weight)]
    padding = large.kernel // 2
    output = deform_conv2d(leaves[0], leaves[1], leaves[2], padding=padding, backend="native")
    worst = compare_corner(output, leaves, padding)
    sizes = f"{large.columns:.3g} columns, {input.numel():.3g} input values"
    return f"{sizes}; errors up to {worst:.2g}"


def make_tensors(large: LargeConvolution, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw input, offset and weight, channels-last and bfloat16; in place, to save memory."""
    torch.manual_seed(0)
    size, taps = large.size, large.kernel**2
    input = torch.empty(
        (1, large.channels, size, size),
        device=device,
        dtype=torch.bfloat16,
        memory_format=torch.channels_last,
    ).normal_()
    offset = torch.zeros(1, 2 * taps, size, size, device=device)
    corner = offset[..., -CROP:, -CROP:]
    corner.copy_(odd_sixteenths(torch.randn(corner.shape)))
    shape = (large.channels, large.channels, large.kernel, large.kernel)
    weight = torch.randn(shape).mul(0.05).to(device, torch.bfloat16)
    return input, offset, weight


def compare_corner(output: Tensor, leaves: list[Tensor], padding: int) -> float:
    """Compare output and gradients at the last corner with the float64 reference on a crop."""
    crops = [_corner(tensor, CROP) for tensor in leaves[:2]]
    exact = [tensor.detach().double().requires_grad_() for tensor in (*crops, leaves[2])]
    truth = deform_conv2d(exact[0], exact[1], exact[2], padding=padding, backend="reference")
    grad = torch.zeros_like(output)
    _corner(grad, CORNER).normal_()
    grads = torch.autograd.grad(output, leaves, grad)
    exact_grads = torch.autograd.grad(truth, exact, _corner(grad, CROP).double())
    pairs = {
        "output": (_corner(output, CORNER), _corner(truth, CORNER)),
        "gradient of input": (_corner(grads[0], CROP), exact_grads[0]),
        "gradient of offset": (_corner(grads[1], CROP), exact_grads[1]),
        "gradient of weight": (grads[2], exact_grads[2]),
    }
    return max(_error(name, *pair) for name, pair in pairs.items())


def check_regions(device: torch.device) -> str:
    size = MANY_INPUTS.size
    require_memory(device, 40)
    torch.manual_seed(0)
    shape = (1, MANY_INPUTS.channels, size, size)
    input = torch.empty(shape, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    crop = _corner(input, CROP).detach().double().requires_grad_()
    moved = size - CROP
    boxes = torch.tensor([[0.0, 8, 9, 39, 41], [0, 20, 3, 45, 30]], device=device)
    far = boxes + torch.tensor([0.0, moved, moved, moved, moved], device=device)
    worst = 0.0
    deformable = partial(deform_roi_pool, offset=None, mode="mmcv")
    for pool in (roi_pool, roi_avg_pool, deformable):
        output = pool(input, far, output_size=4, backend="native")
        truth = pool(crop, boxes.double(), output_size=4, backend="reference")
        (grad,) = torch.autograd.grad(output.sum(), input)
        (exact,) = torch.autograd.grad(truth.sum(), crop)
        error = _error("gradient of input", _corner(grad, CROP), exact)
        worst = max(worst, error, _error("output", output, truth))
    return f"{input.numel():.3g} input values; errors up to {worst:.2g}"


def require_memory(device: torch.device, gib: int) -> None:
    require_gpu(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if free < gib << 30:
        raise SkipTest(f"needs {gib} GiB of free GPU memory; found {free / (1 << 30):.0f} GiB")


def _corner(tensor: Tensor, size: int) -> Tensor:
    return tensor[..., -size:, -size:]


def _error(name: str, result: Tensor, truth: Tensor) -> float:
    difference = (result.detach().double() - truth.detach()).abs().max()
    error = float(difference / truth.detach().abs().max())
    assert error <= _ALLOWED, f"{name} is off by {error:.2g}, allowed {_ALLOWED}"
    return error
