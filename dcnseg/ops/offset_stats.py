"""How far a deformable layer's offsets reach: `offset_statistics`, for metrics and for images."""

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
"""The 95th percentile is taken of at most this many lengths, evenly spaced; 17 ms."""


@dataclass(frozen=True)
class OffsetStatistics:
    """What a layer's offsets do, over all images, groups, taps and locations of one batch.

    A sample is outside when nothing of it lies on the layer's input map, that is when y <= -1,
    y >= H, x <= -1 or x >= W: bilinear interpolation gives 0 there. Padding alone puts some samples
    outside; `grid_outside_share` is the share for the same layer with zero offsets. A value is NaN
    where an offset is NaN, never an exception.

    Attributes:
        mean_px: Mean Euclidean length of an offset, in pixels of the layer's input map.
        p95_px: 95th percentile of that length.
        outside_share: Share of samples outside the map, in [0, 1].
        grid_outside_share: The same share for the plain grid.
    """

    mean_px: float
    p95_px: float
    outside_share: float
    grid_outside_share: float


@dataclass(frozen=True)
class TapGrid:
    """A convolution's plain sampling grid; every pair is (vertical, horizontal)."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def from_layer(cls, layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> TapGrid:
        """Read the grid of `layer`, with "same" and "valid" padding turned into numbers."""
        kernel_size = make_pair(layer.kernel_size, "kernel_size")
        dilation = make_pair(getattr(layer, "dilation", 1), "dilation")
        before = layer.padding
        if before == "same":
            # An odd total puts the extra pixel at the end.
            before = tuple(d * (k - 1) // 2 for k, d in zip(kernel_size, dilation, strict=True))
        padding = make_pair(0 if isinstance(before, str) else before, "padding", 0)
        return cls(kernel_size, make_pair(layer.stride, "stride"), padding, dilation)

    @property
    def num_taps(self) -> int:
        """T, the number of taps of the kernel."""
        return self.kernel_size[0] * self.kernel_size[1]

    def axis_positions(
        self, axis: int, size_out: int, device: torch.device | None = None
    ) -> Tensor:
        """The plain grid along `axis` (0 is y, 1 is x) in the input map, [k, size_out]."""
        taps = torch.arange(self.kernel_size[axis], dtype=torch.float32, device=device)
        locations = torch.arange(size_out, dtype=torch.float32, device=device)
        first = locations * self.stride[axis] - self.padding[axis]
        return first + taps[:, None] * self.dilation[axis]


@torch.no_grad()
def offset_statistics(
    layer: DeformConv2d, offset: Tensor, input_hw: tuple[int, int]
) -> OffsetStatistics:
    """Summarize the offsets that `layer` predicted for a batch.

    Args:
        layer: The layer; only its kernel size, stride, padding, dilation and groups are read.
        offset: Output of `layer.conv_offset`, [B, 2*G*T, H_out, W_out], (dy, dx) interleaved, in
            pixels of the layer's input; the mask logits of a modulated layer may follow as G*T more
            channels and are passed over. Any floating dtype.
        input_hw: Height and width of the layer's input map.

    Raises:
        ShapeError: `offset` has fewer than 2*G*T channels, is not 4-dimensional, or is empty.
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
        spread = (
            base.repeat_interleave(kw, 0)[:, :, None] if axis == 0 else base.repeat(kh, 1)[:, None]
        )
        inside &= _is_on_map(points[:, :, axis] + spread, size_in)

    # MPS has no float64.
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
        ShapeError: The shape does not allow it.
    """
    channels = 2 * offset_groups * grid.num_taps
    if offset.ndim != 4 or offset.shape[1] < channels or offset.numel() == 0:
        raise ShapeError(
            f"`offset` has the shape {list(offset.shape)}; a kernel of {grid.kernel_size[0]}x"
            f"{grid.kernel_size[1]} with offset_groups={offset_groups} needs [B, {channels}, "
            "H_out, W_out], not empty. Pass the output of the layer's `conv_offset`."
        )
    batch, _, height, width = offset.shape
    shape = batch, offset_groups, grid.num_taps, 2, height, width
    return offset[:, :channels].float().reshape(shape)


def _is_on_map(position: Tensor, size: int) -> Tensor:
    """Whether bilinear interpolation at `position` gives weight to a pixel of 0..size-1."""
    return (position > -1) & (position < size)


def _percentile_95(length: Tensor) -> float:
    """95th percentile of a large tensor without NaN, interpolated as torch.quantile does."""
    values = length.flatten()
    step = -(-values.numel() // MAX_QUANTILE_VALUES)
    values = values[::step].cpu()
    rank = 0.95 * (values.numel() - 1)
    low = int(rank)
    below = float(values.kthvalue(low + 1).values)
    if low == rank:
        return below
    above = float(values.kthvalue(low + 2).values)
    # Not a weighted sum of both: 0 * inf would be NaN.
    return below if above == below else below + (rank - low) * (above - below)
