"""Positions of feature map pixels in the network's input; entry point `trace_map_geometry`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dcnseg.ops.offset_stats import TapGrid

Pair = tuple[float, float]
WatchedLayer = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d


@dataclass(frozen=True)
class MapGeometry:
    """Position of a feature map: pixel i has its center at `origin_px + i * stride_px`.

    Pairs are (y, x), in pixels of the network's input or of the image; 0 is the center of the first
    pixel.
    """

    stride_px: Pair
    origin_px: Pair

    def in_image(self, network_hw: tuple[int, int], image_hw: tuple[int, int]) -> MapGeometry:
        """Convert from pixels of the network's input to pixels of the image before resizing.

        Resizing aligns the outer edges: x_image = (x_network + 0.5) / scale - 0.5.
        """
        factors = [image / network for image, network in zip(image_hw, network_hw, strict=True)]
        stride = [s * f for s, f in zip(self.stride_px, factors, strict=True)]
        origin = [(o + 0.5) * f - 0.5 for o, f in zip(self.origin_px, factors, strict=True)]
        return MapGeometry((stride[0], stride[1]), (origin[0], origin[1]))


@dataclass
class GeometryTrace:
    """The geometries that `trace_map_geometry` recorded, by map size."""

    by_size: dict[tuple[int, int], MapGeometry] = field(default_factory=dict)
    network_hw: tuple[int, int] | None = None  # including padding

    def of(self, size_hw: tuple[int, int]) -> MapGeometry:
        """Return the geometry of maps of this size.

        Unknown sizes are assumed to be a symmetric reduction by a power of two.
        """
        if size_hw in self.by_size or self.network_hw is None:
            return self.by_size.get(size_hw, MapGeometry((1.0, 1.0), (0.0, 0.0)))
        ratio = max(big / small for big, small in zip(self.network_hw, size_hw, strict=True))
        stride = 2.0 ** round(math.log2(ratio))
        return MapGeometry((stride, stride), (0.0, 0.0))

    def record(self, module: WatchedLayer, map_in: Tensor, map_out: Tensor) -> None:
        """Record the geometry of `map_out` if the layer changed the size."""
        size_in, size_out = _get_size_hw(map_in), _get_size_hw(map_out)
        if self.network_hw is None:
            self.network_hw = size_in
            self.by_size[size_in] = MapGeometry((1.0, 1.0), (0.0, 0.0))
        if size_in == size_out or size_out in self.by_size:
            return
        before = self.of(size_in)
        kernel = TapGrid.from_layer(module)
        strides, origins = [], []
        for axis in range(2):
            pad_before = _get_pad_before(kernel, axis, size_in[axis], size_out[axis])
            center = kernel.dilation[axis] * (kernel.kernel_size[axis] - 1) / 2 - pad_before
            strides.append(before.stride_px[axis] * kernel.stride[axis])
            origins.append(before.origin_px[axis] + center * before.stride_px[axis])
        self.by_size[size_out] = MapGeometry((strides[0], strides[1]), (origins[0], origins[1]))


@contextmanager
def trace_map_geometry(model: nn.Module) -> Iterator[GeometryTrace]:
    """Record the geometry of all feature maps of `model` while the block runs.

    Exact for layers with symmetric padding (ResNet), without padding (2x2 pooling in VGG and
    DenseNet), and with "same" padding outside the layer that puts the odd pixel at the end
    (EfficientNet). The network's input may be padded at the bottom and right only.
    """
    trace = GeometryTrace()

    def hook(module: WatchedLayer, inputs: tuple[Any, ...], output: Any) -> None:
        map_in = inputs[0] if inputs else None
        if isinstance(map_in, Tensor) and isinstance(output, Tensor) and output.ndim == 4:
            trace.record(module, map_in, output)

    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if isinstance(module, WatchedLayer)
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _get_pad_before(kernel: TapGrid, axis: int, size_in: int, size_out: int) -> int:
    """Return the padding at the start: the layer's own, or half of the "same" padding."""
    reach = kernel.dilation[axis] * (kernel.kernel_size[axis] - 1)
    stride, padding = kernel.stride[axis], kernel.padding[axis]
    if padding > 0 or (size_in - reach - 1) // stride + 1 == size_out:
        return padding
    return max((size_out - 1) * stride + reach + 1 - size_in, 0) // 2


def _get_size_hw(tensor: Tensor) -> tuple[int, int]:
    return int(tensor.shape[-2]), int(tensor.shape[-1])
