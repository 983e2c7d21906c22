"""Statistics of the offsets of a deformable convolution: `offset_statistics`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dcnseg.errors import ShapeError
from dcnseg.ops.checks import Pair, make_pair

if TYPE_CHECKING:
    from torch import nn

    from dcnseg.ops.deform_conv.module import DeformConv2d

MAX_QUANTILE_VALUES = 1_000_000
"""The 95th percentile is computed from at most this many evenly spaced lengths (17 ms)."""


@dataclass(frozen=True)
class OffsetStatistics:
    """Statistics over all images, offset groups, taps and locations of a batch.

    A sample is outside the input map if y <= -1, y >= H, x <= -1 or x >= W, where bilinear
    interpolation returns 0. Padding alone places some samples outside the map. If an offset is
    NaN, the first three values are NaN.

    Attributes:
        mean_px: Mean Euclidean length of the offsets, in pixels of the layer's input map.
        p95_px: 95th percentile of that length.
        outside_share: Fraction of the samples outside the map, in [0, 1].
        grid_outside_share: The same fraction with zero offsets.
    """

    mean_px: float
    p95_px: float
    outside_share: float
    grid_outside_share: float


@dataclass(frozen=True)
class TapGrid:
    """The sampling grid of a convolution without offsets; every pair is (y, x)."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def from_layer(cls, layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> TapGrid:
        """Return the grid of `layer`; "same" and "valid" padding are converted to pixels."""
        kernel_size = make_pair(layer.kernel_size, "kernel_size")
        dilation = make_pair(getattr(layer, "dilation", 1), "dilation")
        before = layer.padding
        if before == "same":
            # An odd total adds the extra pixel at the end.
            before = tuple(d * (k - 1) // 2 for k, d in zip(kernel_size, dilation, strict=True))
        padding = make_pair(0 if isinstance(before, str) else before, "padding", 0)
        return cls(kernel_size, make_pair(layer.stride, "stride"), padding, dilation)

    @property
    def num_taps(self) -> int:
        """Number of taps T = kh*kw."""
        return self.kernel_size[0] * self.kernel_size[1]

    def axis_positions(
        self, axis: int, size_out: int, device: torch.device | None = None
    ) -> Tensor:
        """Grid along `axis` (0 is y, 1 is x) in pixels of the input map, [k, size_out]."""
        taps = torch.arange(self.kernel_size[axis], dtype=torch.float32, device=device)
        locations = torch.arange(size_out, dtype=torch.float32, device=device)
        first = locations * self.stride[axis] - self.padding[axis]
        return first + taps[:, None] * self.dilation[axis]


@torch.no_grad()
def offset_statistics(
    layer: DeformConv2d, offset: Tensor, input_hw: tuple[int, int]
) -> OffsetStatistics:
    """Compute statistics of the offsets that `layer` predicted for a batch.

    Args:
        layer: The layer; its kernel size, stride, padding, dilation and offset groups are used.
        offset: Output of `layer.conv_offset`, [B, 2*G*T, H_out, W_out], (dy, dx) interleaved, in
            pixels of the layer's input. The mask logits of a modulated layer may follow as G*T
            more channels and are ignored. Any floating-point dtype.
        input_hw: Height and width of the layer's input map in pixels.

    Raises:
        ShapeError: `offset` is not 4-dimensional, has fewer than 2*G*T channels or is empty.
    """
    grid = TapGrid.from_layer(layer)
    points = split_offset(offset, layer.offset_groups, grid).flatten(0, 1)  # [B*G, T, 2, Ho, Wo]
    length = torch.linalg.vector_norm(points, dim=2)
    height_out, width_out = points.shape[-2:]

    inside = torch.ones_like(length, dtype=torch.bool)
    grid_inside = []
    kh, kw = grid.kernel_size
    for axis, (size_in, size_out) in enumerate(zip(input_hw, (height_out, width_out), strict=True)):
        base = grid.axis_positions(axis, size_out, points.device)
        grid_inside.append(int(_is_on_map(base, size_in).sum()) / base.numel())
        # [k, size_out] -> [T, Ho or 1, Wo or 1], taps row-major
        tap_grid = (
            base.repeat_interleave(kw, 0)[:, :, None] if axis == 0 else base.repeat(kh, 1)[:, None]
        )
        inside &= _is_on_map(points[:, :, axis] + tap_grid, size_in)

    # MPS does not support float64.
    mean_px = float(length.mean(dtype=torch.float64 if length.device.type != "mps" else None))
    is_nan = math.isnan(mean_px)
    return OffsetStatistics(
        mean_px=mean_px,
        p95_px=math.nan if is_nan else _percentile_95(length),
        outside_share=math.nan if is_nan else 1.0 - int(inside.sum()) / inside.numel(),
        grid_outside_share=1.0 - grid_inside[0] * grid_inside[1],
    )


def split_offset(offset: Tensor, offset_groups: int, grid: TapGrid) -> Tensor:
    """View the first 2*G*T channels of [B, C, Ho, Wo] as float32 [B, G, T, 2 (dy, dx), Ho, Wo].

    Raises:
        ShapeError: `offset` does not have such a shape.
    """
    channels = 2 * offset_groups * grid.num_taps
    if offset.ndim != 4 or offset.shape[1] < channels or offset.numel() == 0:
        raise ShapeError(
            f"`offset` has the shape {list(offset.shape)}; a {grid.kernel_size[0]}x"
            f"{grid.kernel_size[1]} kernel with offset_groups={offset_groups} needs a non-empty "
            f"[B, {channels}, H_out, W_out]. Pass the output of the layer's `conv_offset`."
        )
    batch, _, height, width = offset.shape
    shape = batch, offset_groups, grid.num_taps, 2, height, width
    return offset[:, :channels].float().reshape(shape)


def _is_on_map(position: Tensor, size: int) -> Tensor:
    """Return where bilinear interpolation reads a pixel of 0..size-1."""
    return (position > -1) & (position < size)


def _percentile_95(length: Tensor) -> float:
    """95th percentile without NaN, interpolated as in torch.quantile, which limits the size."""
    values = length.flatten()
    step = -(-values.numel() // MAX_QUANTILE_VALUES)
    values = values[::step].cpu()
    rank = 0.95 * (values.numel() - 1)
    low = int(rank)
    below = float(values.kthvalue(low + 1).values)
    if low == rank:
        return below
    above = float(values.kthvalue(low + 2).values)
    # A weighted sum would give NaN for 0 * inf.
    return below if above == below else below + (rank - low) * (above - below)
