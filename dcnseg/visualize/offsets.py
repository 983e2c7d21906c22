"""Offsets and sampling positions of a network for one image; entry point `capture_offsets`.

Tensors are in (y, x) order like the offsets; points and results named `_xy` are (x, y). (0, 0) is
the center of the upper left pixel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnseg.errors import ConfigError, ShapeError
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.ops.offset_stats import OffsetStatistics, TapGrid, offset_statistics, split_offset
from dcnseg.visualize.geometry import MapGeometry, trace_map_geometry

MAX_NETWORK_PIXELS = 2048 * 2048
CASCADE_DEPTH: Final = 3  # layers, as in the paper's Figure 6: 9^3 = 729 sampling points


@dataclass(frozen=True)
class LayerOffsets:
    """Offsets of one deformable layer for one image.

    Attributes:
        name: The layer's name in the model.
        offset: Offsets (dy, dx) in pixels of the layer's input map, float32
            [G, T, 2, H_out, W_out] on the CPU.
        mask: Modulation in [0, 2], float32 [G, T, H_out, W_out], or None.
        grid: Kernel size, stride, padding and dilation.
        input_hw: Size of the layer's input map.
        input_geometry: Position of the input map in the image.
        statistics: Summary of `offset`, in pixels of the input map.
    """

    name: str
    offset: Tensor
    mask: Tensor | None
    grid: TapGrid
    input_hw: tuple[int, int]
    input_geometry: MapGeometry
    statistics: OffsetStatistics

    @property
    def title(self) -> str:
        """The name for readers: "layer 4.1 conv2" for "encoder.layer4.1.conv2"."""
        first, *parts = self.name.removeprefix("encoder.").split(".")
        title = re.sub(r"^(\D+)(\d+)$", r"\1 \2", first)
        for part in parts:
            title += ("." if part.isdigit() and title[-1].isdigit() else " ") + part
        return title

    @property
    def output_geometry(self) -> MapGeometry:
        """Position of the output locations in the image: the centers of the plain grids."""
        strides, origins = [], []
        for axis in range(2):
            stride_px = self.input_geometry.stride_px[axis]
            middle = self.grid.dilation[axis] * (self.grid.kernel_size[axis] - 1) / 2
            center = middle - self.grid.padding[axis]
            strides.append(stride_px * self.grid.stride[axis])
            origins.append(self.input_geometry.origin_px[axis] + center * stride_px)
        return MapGeometry((strides[0], strides[1]), (origins[0], origins[1]))

    @property
    def plain_dilation_px(self) -> float:
        """Effective dilation of the plain grid, in image pixels."""
        zero = torch.zeros(1, self.grid.num_taps, 2, 1, 1)
        return float(_mean_adjacent_distance(self, zero, self.input_geometry.stride_px))

    def displacement_px(self, *, is_plain: bool = False) -> Tensor:
        """Compute sampling positions relative to their output location, in image pixels.

        Args:
            is_plain: Ignore the offsets, as in a plain convolution.

        Returns:
            (dy, dx), float64 [G, T, 2, H_out, W_out].
        """
        offset = self.offset.double()
        steps = compute_tap_steps(self.grid)[:, :, None, None]  # [T, 2, 1, 1]
        stride = torch.tensor(self.input_geometry.stride_px, dtype=torch.float64)[:, None, None]
        return (torch.zeros_like(offset) if is_plain else offset).add(steps) * stride


@dataclass(frozen=True)
class SamplingPoints:
    """Sampling points of one output location.

    Attributes:
        point_xy: The requested point, in image pixels.
        location_xy: The nearest output location, in image pixels.
        positions_xy: Sampling positions in image pixels, float64 [(G*T)**n, 2]; the taps of the
            last layer change slowest. They may be outside the image, and are NaN for NaN offsets.
        weights: Product of the modulation masks along the path, [(G*T)**n]; 1 without modulation.
    """

    point_xy: tuple[float, float]
    location_xy: tuple[float, float]
    positions_xy: Tensor
    weights: Tensor


def limit_size(network_input: Tensor) -> Tensor:
    """Downscale a network input, [1, 3, h, w], that is too large to process without windows."""
    height, width = network_input.shape[-2:]
    factor = (MAX_NETWORK_PIXELS / (height * width)) ** 0.5
    if factor >= 1:
        return network_input
    size = max(1, int(height * factor)), max(1, int(width * factor))
    return F.interpolate(network_input, size=size, mode="bilinear", antialias=True)


@torch.no_grad()
def capture_offsets(
    model: nn.Module, network_input: Tensor, image_hw: tuple[int, int]
) -> list[LayerOffsets]:
    """Run the model once and return the offsets of its deformable layers, in forward order.

    The image is not split into windows.

    Args:
        model: A network with `DeformConv2d` layers, in evaluation mode. It may pad its input at the
            bottom and right only.
        network_input: The normalized, possibly resized image, [1, 3, h, w].
        image_hw: Size of the image before resizing; positions are in its pixels.

    Raises:
        ConfigError: The model has no deformable layer, or is in training mode.
        ShapeError: `network_input` is not one image.
    """
    if network_input.ndim != 4 or network_input.shape[0] != 1:
        raise ShapeError(
            f"`network_input` has shape {list(network_input.shape)}; expected one image, "
            "[1, 3, h, w]."
        )
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, DeformConv2d)]
    if not layers:
        raise ConfigError(
            "The model has no deformable layer, so it has no offsets. Train with, for example, "
            "--deform-layers 3."
        )
    if model.training:
        raise ConfigError("`model` is in training mode; call model.eval() first.")

    captured: dict[str, tuple[DeformConv2d, tuple[int, int], Tensor]] = {}

    def capture(
        name: str, layer: DeformConv2d, _: Any, inputs: tuple[Any, ...], output: Any
    ) -> None:
        captured[name] = layer, tuple(inputs[0].shape[-2:]), output.detach().float().cpu()

    handles = [m.conv_offset.register_forward_hook(partial(capture, name, m)) for name, m in layers]
    try:
        with trace_map_geometry(model) as trace:
            model(network_input)
    finally:
        for handle in handles:
            handle.remove()

    network_hw = int(network_input.shape[-2]), int(network_input.shape[-1])
    return [
        _parse_prediction(
            name, layer, prediction, input_hw, trace.of(input_hw).in_image(network_hw, image_hw)
        )
        for name, (layer, input_hw, prediction) in captured.items()
    ]


def compute_effective_dilation(layer: LayerOffsets, *, in_image: bool = True) -> Tensor:
    """Mean distance between adjacent sampling positions at every output location, [H_out, W_out].

    The mean over all horizontally or vertically adjacent taps (12 pairs for a 3x3 kernel) and all
    offset groups. For a plain grid of dilation d it is d map pixels, or d * stride_px image pixels.

    Args:
        layer: The layer's offsets.
        in_image: Whether the unit is image pixels, rather than pixels of the layer's input map.

    Raises:
        ConfigError: The kernel is 1x1, which has no adjacent taps.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", section 4.2 and Table 2.
    """
    stride_px = layer.input_geometry.stride_px if in_image else (1.0, 1.0)
    return _mean_adjacent_distance(layer, layer.offset, stride_px)


def compute_sampling_positions(layer: LayerOffsets, *, is_plain: bool = False) -> Tensor:
    """Sampling positions (y, x) of all locations in image pixels, [G, T, 2, H_out, W_out]."""
    output = layer.output_geometry
    axes = [
        output.origin_px[axis] + output.stride_px[axis] * torch.arange(size, dtype=torch.float64)
        for axis, size in enumerate(layer.offset.shape[-2:])
    ]
    locations = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # [2, H_out, W_out]
    return locations + layer.displacement_px(is_plain=is_plain)


def trace_cascade(
    layers: Sequence[LayerOffsets], point_xy: tuple[float, float], *, is_plain: bool = False
) -> SamplingPoints:
    """Trace a point back through the sampling positions of consecutive deformable layers.

    Starts at the output location of the last layer that is nearest to the point and has T sampling
    positions per offset group in its input map. Each position is traced through the previous layer
    with the offsets of the nearest output location, clamped to the map. Only the lookup is clamped,
    not the position itself. Plain convolutions between the layers are ignored: they are 1x1 in
    bottleneck ResNets; with plain 3x3 convolutions (basic blocks) the true field is wider.

    Args:
        layers: One or more layers in forward order.
        point_xy: The point in image pixels.
        is_plain: Ignore the offsets, for comparison.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", Figure 6.
    """
    row, column = find_nearest_location(layers[-1], torch.tensor([[point_xy[1], point_xy[0]]]))
    output = layers[-1].output_geometry
    location_yx = [
        origin + stride * int(index)
        for origin, stride, index in zip(
            output.origin_px, output.stride_px, (row, column), strict=True
        )
    ]
    positions = torch.tensor([location_yx], dtype=torch.float64)  # [N, 2 (y, x)]
    weights = torch.ones(1)
    for layer in reversed(layers):
        rows, columns = find_nearest_location(layer, positions)
        steps = layer.displacement_px(is_plain=is_plain)[..., rows, columns]  # [G, T, 2, N]
        positions = (positions[:, None] + steps.permute(3, 0, 1, 2).flatten(1, 2)).flatten(0, 1)
        factors = torch.ones(*steps.shape[:2], len(rows))
        if layer.mask is not None and not is_plain:
            factors = layer.mask[..., rows, columns]  # [G, T, N]
        weights = (weights[:, None] * factors.flatten(0, 1).T).flatten()
    return SamplingPoints(point_xy, (location_yx[1], location_yx[0]), positions.flip(-1), weights)


def compute_tap_steps(grid: TapGrid) -> Tensor:
    """Compute the taps (y, x) of a plain grid relative to its center, in map pixels, [T, 2]."""
    axes = [
        (torch.arange(k, dtype=torch.float64) - (k - 1) / 2) * d
        for k, d in zip(grid.kernel_size, grid.dilation, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


def _parse_prediction(
    name: str,
    layer: DeformConv2d,
    prediction: Tensor,
    input_hw: tuple[int, int],
    geometry: MapGeometry,
) -> LayerOffsets:
    """Split the output of the layer's `conv_offset`, [1, C, H_out, W_out]."""
    grid = TapGrid.from_layer(layer)
    offset = split_offset(prediction, layer.offset_groups, grid)[0]
    mask = None
    if layer.modulated:
        logits = prediction[0, offset.shape[:3].numel() :]
        mask = (2 * logits.sigmoid()).reshape(-1, grid.num_taps, *logits.shape[1:])
    statistics = offset_statistics(layer, prediction, input_hw)
    return LayerOffsets(name, offset, mask, grid, input_hw, geometry, statistics)


def _mean_adjacent_distance(
    layer: LayerOffsets, offset: Tensor, stride_px: tuple[float, float]
) -> Tensor:
    """Mean distance over adjacent taps and groups, [H, W]; `offset` is [G, T, 2, H, W]."""
    grid = layer.grid
    if grid.num_taps == 1:
        raise ConfigError(f"{layer.name} has a 1x1 kernel, which has no effective dilation.")
    points = offset.double() + compute_tap_steps(grid)[:, :, None, None]
    points = points * torch.tensor(stride_px, dtype=torch.float64)[:, None, None]
    points = points.reshape(-1, *grid.kernel_size, *points.shape[2:])  # [G, kh, kw, 2, H, W]
    distances = [
        torch.linalg.vector_norm(points.diff(dim=dim), dim=3).flatten(0, 2) for dim in (1, 2)
    ]
    return torch.cat(distances).mean(0)


def find_nearest_location(layer: LayerOffsets, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Find the row and column of the output location nearest to each (y, x), [N, 2]."""
    output = layer.output_geometry
    indices = []
    for axis, size in enumerate(layer.offset.shape[-2:]):
        index = (positions[:, axis] - output.origin_px[axis]) / output.stride_px[axis]
        # A NaN position looks up location 0 and stays NaN, because steps are added to it.
        indices.append((index.nan_to_num(0.0) + 0.5).floor().clamp(0, size - 1).long())
    return indices[0], indices[1]
