"""Calls of every operator, with inputs that allow a comparison across dtypes.

Feature maps and weights are drawn in the dtype under test, so that the exact result for the same
numbers is known. Offsets are odd sixteenths of a pixel, so that no sample lies on a pixel, where
derivatives jump.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.common import gradient_like, odd_sixteenths
from dcnseg import ops
from dcnseg.ops.backend import Backend

Tensors: TypeAlias = Mapping[str, Tensor]  # by the operator's argument names

BOXES = "boxes"  # the only argument without a gradient
_BINS = (2, 4)
_SCALE = 0.5


@dataclass(frozen=True)
class OperatorCase:
    """One call of an operator.

    Attributes:
        operator: Name of the public function.
        name: What distinguishes the case.
        make: Draws the tensors on the CPU in a dtype, the feature map first.
        call: Runs the operator on the tensors' device.
    """

    operator: str
    name: str
    make: Callable[[torch.dtype], dict[str, Tensor]]
    call: Callable[[Backend, Tensors], Tensor]

    def __str__(self) -> str:
        return f"{self.operator} {self.name}".rstrip()

    def results(
        self, tensors: Tensors, backend: Backend, grad: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the output and the gradients of all tensors but the boxes."""
        given = as_leaves(tensors)
        output = self.call(backend, given)
        leaves = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
        grad = gradient_like(output) if grad is None else grad
        grads = torch.autograd.grad(output, list(leaves.values()), grad)
        named = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {"output": output.detach(), **named}


def as_leaves(tensors: Tensors) -> dict[str, Tensor]:
    """Return leaves that share the tensors' memory; all but the boxes require a gradient."""
    return {name: tensor.detach().requires_grad_(name != BOXES) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Convolution:
    """Sizes and settings of a deformable convolution."""

    channels: int
    out_channels: int
    size_hw: tuple[int, int]
    kernel_size: tuple[int, int] = (3, 3)
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = False
    bias: bool = False
    window: dict[str, Any] = field(default_factory=lambda: {"padding": 1})
    batch: int = 2

    def make(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Draw input, offset and weight, and mask and bias if the case has them."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        taps = self.kernel_size[0] * self.kernel_size[1]
        out_hw = self._output_hw()
        tensors = {
            "input": draw(self.batch, self.channels, *self.size_hw),
            "offset": odd_sixteenths(draw(self.batch, 2 * self.offset_groups * taps, *out_hw)),
            "weight": draw(self.out_channels, self.channels // self.groups, *self.kernel_size),
        }
        if self.modulated:
            tensors["mask"] = draw(self.batch, self.offset_groups * taps, *out_hw)
        if self.bias:
            tensors["bias"] = draw(self.out_channels)
        return tensors

    def case(self, name: str = "") -> OperatorCase:
        """Return the call as a case."""
        return OperatorCase("deform_conv2d", name, self.make, self.call)

    def call(self, backend: Backend, tensors: Tensors) -> Tensor:
        """Convolve."""
        arguments: dict[str, Any] = {**tensors, **self.window}
        return ops.deform_conv2d(**arguments, backend=backend)

    def _output_hw(self) -> tuple[int, int]:
        """Return the output size of a dense convolution with the same settings."""
        window = {name: value for name, value in self.window.items() if name != "border"}
        probe = torch.empty(1, 1, *self.size_hw, device="meta")
        kernel = torch.empty(1, 1, *self.kernel_size, device="meta")
        height, width = torch.nn.functional.conv2d(probe, kernel, **window).shape[2:]
        return height, width


# The tensor core kernels need channel counts that are multiples; other kernels handle the rest.
CONVOLUTIONS = {
    "v1": Convolution(8, 6, (9, 11)),
    "v2, bias": Convolution(8, 6, (9, 11), modulated=True, bias=True),
    "dcnv1 border": Convolution(8, 6, (9, 11), window={"padding": 1, "border": "dcnv1"}),
    "2 groups, 2 offset groups, stride 2": Convolution(
        16, 12, (11, 9), groups=2, offset_groups=2, window={"stride": 2, "padding": 1}
    ),
    "odd sizes, kernel 2x3": Convolution(
        6, 7, (9, 10), (2, 3), modulated=True, window={"stride": (2, 1), "padding": (1, 2)}
    ),
    "64 channels, dilation 2, v2, bias": Convolution(
        64, 128, (33, 35), modulated=True, bias=True, window={"padding": 2, "dilation": 2}
    ),
    "64 channels, dcnv1 border": Convolution(
        64, 64, (17, 19), modulated=True, window={"padding": 1, "border": "dcnv1"}
    ),
    "128 channels, 4 offset groups": Convolution(
        128, 64, (17, 19), offset_groups=4, modulated=True
    ),
    "128 channels, 2 groups": Convolution(128, 128, (17, 19), groups=2, bias=True),
    "256 channels": Convolution(256, 256, (20, 21)),
    "72 outputs, stride 2": Convolution(
        64, 72, (31, 33), batch=3, window={"stride": 2, "padding": 1}
    ),
    "kernel 1x1": Convolution(64, 64, (13, 15), (1, 1), window={}),
}
QUICK_CONVOLUTIONS = ("v2, bias", "dcnv1 border", "2 groups, 2 offset groups, stride 2")

# Operator, name, keyword arguments besides the boxes, and whether there are offsets.
_POOLING_CASES: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
    ("roi_pool", "", {}, False),
    ("roi_avg_pool", "", {}, False),
    ("ps_roi_pool", "", {}, False),
    ("ps_roi_pool", "rfcn corners", {"corners": "rfcn"}, False),
    ("deform_roi_pool", "without offsets", {}, False),
    ("deform_roi_pool", "paper", {}, True),
    ("deform_roi_pool", "mmcv", {"mode": "mmcv"}, True),
    ("deform_roi_pool", "mxnet", {"mode": "mxnet"}, True),
    ("deform_ps_roi_pool", "paper, 1x2 groups", {"group_size": (1, 2)}, True),
    ("deform_ps_roi_pool", "mxnet", {"mode": "mxnet"}, True),
)


def make_cases(*, quick: bool = False) -> Iterator[OperatorCase]:
    """Yield all cases; with `quick`, only a few convolutions."""
    for name, convolution in CONVOLUTIONS.items():
        if not quick or name in QUICK_CONVOLUTIONS:
            yield convolution.case(name)
    for operator, name, settings, has_offset in _POOLING_CASES:
        make = partial(_make_pooling_tensors, has_offset=has_offset)
        yield OperatorCase(operator, name, make, partial(_pool, operator, settings))


def one_case_per_operator(*, quick: bool = False) -> Iterator[OperatorCase]:
    """Yield a case of each operator that uses all of its tensors.

    There are two convolutions, one of them for the tensor cores.
    """
    chosen = ("v2, bias", "64 channels, dilation 2, v2, bias", "", "paper", "paper, 1x2 groups")
    return (case for case in make_cases(quick=quick) if case.name in chosen)


def _make_pooling_tensors(dtype: torch.dtype, *, has_offset: bool) -> dict[str, Tensor]:
    """Draw a feature map [2, 32, 9, 11], boxes [20, 5] in eighths of a pixel, and offsets.

    Some boxes reach beyond the feature map.
    """
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(20, 5, generator=generator) * torch.tensor([2.0, 24, 20, 30, 26])
    boxes = (boxes * 8).round() / 8 - torch.tensor([0.0, 4, 4, 4, 4])
    boxes[:, 0] = torch.arange(20) % 2
    tensors = {
        "input": torch.randn(2, 32, 9, 11, generator=generator).to(dtype),
        BOXES: boxes.to(torch.promote_types(dtype, torch.float32)),
    }
    if has_offset:
        tensors["offset"] = torch.randn(20, 2, *_BINS, generator=generator).to(dtype)
    return tensors


def _pool(operator: str, settings: dict[str, Any], backend: Backend, tensors: Tensors) -> Tensor:
    arguments: list[Tensor | None] = [tensors["input"], tensors[BOXES]]
    if operator.startswith("deform"):
        arguments.append(tensors.get("offset"))
    pool: Callable[..., Tensor] = getattr(ops, operator)
    return pool(*arguments, _BINS, _SCALE, backend=backend, **settings)
