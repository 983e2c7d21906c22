"""Figures of the effective dilation, the offset field and the sampling points, as RGB arrays."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor

from dcnseg.lettering import INK, WHITE, Color
from dcnseg.ops.offset_stats import TapGrid
from dcnseg.visualize.canvas import (
    Floats,
    Margins,
    Panel,
    Rgb,
    color_bar,
    colorize,
    compose,
    concatenate,
    dim,
    engrave,
)
from dcnseg.visualize.geometry import MapGeometry
from dcnseg.visualize.offsets import (
    LayerOffsets,
    SamplingPoints,
    compute_effective_dilation,
    compute_sampling_positions,
)

RED: Color = (235, 40, 40)
GREEN: Color = (40, 230, 70)
YELLOW: Color = (255, 214, 64)
PALE: Color = (200, 205, 215)
DILATION_COLORS = cv2.COLORMAP_VIRIDIS
LENGTH_COLORS = cv2.COLORMAP_INFERNO
MAX_MARGIN_SHARE = 0.75
"""Maximum margin on each side, as a share of the image's longer side."""


def draw_effective_dilation(image: Rgb, layer: LayerOffsets) -> Rgb:
    """Draw the image, and the effective dilation as a heat map over it."""
    dilation = compute_effective_dilation(layer).numpy()
    plain = layer.plain_dilation_px
    heat = _draw_heat_map(
        image, dilation, layer.output_geometry, DILATION_COLORS, (plain, f"plain {plain:.4g}")
    )
    notes = [
        "Effective dilation: mean distance between adjacent sampling points, in image pixels.",
        f"This image: {_format_range(dilation)}. "
        f"Plain grid: {plain:.4g} px ({_describe_grid(layer)}).",
    ]
    panels = [("Input image", Panel.from_image(image).canvas), ("Effective dilation", heat)]
    return compose(panels, _count_columns(image, 2), f"{layer.name}: effective dilation", notes)


def draw_offset_field(image: Rgb, layer: LayerOffsets) -> Rgb:
    """Draw the image, sampling grids, mean offsets as arrows, and offset lengths as a heat map."""
    offset = layer.offset.double().numpy()  # [G, T, 2, Ho, Wo]
    stride_px = np.array(layer.input_geometry.stride_px)[:, None, None]
    displacement = offset.mean((0, 1)) * stride_px  # [2, Ho, Wo]
    length = np.linalg.norm(offset * stride_px, axis=2).mean((0, 1))
    arrows, factor = _draw_arrows(image, displacement, layer.output_geometry)
    scale_text = "to scale" if factor == 1 else f"arrow length x{factor:g}"
    panels = [
        ("Input image", Panel.from_image(image).canvas),
        ("Sampling grids (yellow) and plain grids (gray)", _draw_meshes(image, layer)),
        (f"Mean offset ({scale_text})", arrows),
        (
            "Mean offset length",
            _draw_heat_map(image, length, layer.output_geometry, LENGTH_COLORS, None),
        ),
    ]
    stats = layer.statistics
    notes = [
        f"Offset length in image pixels: {_format_range(length)}.",
        f"Offset length in feature map pixels: mean {stats.mean_px:.3g}, 95th percentile "
        f"{stats.p95_px:.3g} ({_describe_grid(layer)}).",
        f"Share of sampling points outside the feature map: {stats.outside_share:.3f} "
        f"(plain grid: {stats.grid_outside_share:.3f}).",
    ]
    return compose(panels, _count_columns(image, 2), f"{layer.name}: offsets", notes)


def draw_sampling_points(
    image: Rgb,
    grid: TapGrid,
    last_layer: tuple[SamplingPoints, SamplingPoints],
    cascade: tuple[SamplingPoints, SamplingPoints],
    layer_names: Sequence[str],
) -> Rgb:
    """Draw the sampling points of one output location: last layer (top) and cascade (bottom).

    The output location is a green square, the sampling points are red. Points outside the image are
    drawn in a margin of at most `MAX_MARGIN_SHARE`; points beyond it are counted in the caption.

    Args:
        image: The image, uint8 RGB [H, W, 3].
        grid: Grid of the last layer.
        last_layer: Sampling points of the last layer: plain grid, deformable.
        cascade: Sampling points of the cascade of layers: plain grid, deformable.
        layer_names: Names of the cascade's layers, in forward order.
    """
    points = (*last_layer, *cascade)
    margins = _compute_margins(image, np.concatenate([p.positions_xy.numpy() for p in points]))
    panels = []
    for samples, kind in zip(last_layer, ("plain grid", "deformable"), strict=True):
        panel = Panel.from_image(image, margins)
        positions = samples.positions_xy.numpy()
        for mesh in np.split(positions, len(positions) // grid.num_taps):
            _draw_mesh(panel, mesh, grid, WHITE, 1)
        panels.append(_draw_samples(panel, samples, 6.0, f"Last layer, {kind}"))
    for samples, kind in zip(cascade, ("plain grid", "deformable"), strict=True):
        panel = Panel.from_image(image, margins)
        text = f"Cascade of the last {len(layer_names)} layers, {kind}"
        radius = 3.0 * min(1.0, (1000 / len(samples.positions_xy)) ** 0.25)
        panels.append(_draw_samples(panel, samples, radius, text))
    (x, y), (location_x, location_y) = last_layer[0].point_xy, last_layer[0].location_xy
    title = f"Sampling points for ({x:g}, {y:g})"
    notes = [
        f"Green: nearest output location, ({location_x:g}, {location_y:g}). Red: sampling points. "
        "Hatched: outside the image.",
        "Layers: " + ", ".join(layer_names) + ".",
    ]
    if any((p.weights != 1).any() for p in points):
        notes[0] += " Dot area: modulation."
    return compose(panels, _count_columns(image, 2), title, notes)


def _draw_samples(
    panel: Panel, samples: SamplingPoints, radius: float, caption: str
) -> tuple[str, Rgb]:
    """Draw sampling points with areas proportional to the modulation; add counts to the caption."""
    positions = samples.positions_xy.numpy()
    weights = samples.weights.double().numpy()
    # The area is proportional to the weight (1 without modulation), with a visible minimum.
    radii = radius * np.sqrt(np.clip(np.nan_to_num(weights), 0.08, 2.0))
    num_distinct = len(np.unique(np.round(positions, 3), axis=0))
    # Outlines make few dots stand out, but many of them would cover the image.
    panel.dots(positions, radii, RED, WHITE if num_distinct <= 100 else None)
    panel.square(samples.location_xy, 9.0, GREEN)
    text = f"{caption}: {len(positions)} points"
    if num_distinct < len(positions):
        text += f" at {num_distinct} positions"
    is_finite = np.isfinite(positions).all(1)
    num_beyond = int((is_finite & ~panel.is_within(positions)).sum())
    if num_beyond:
        text += f", {num_beyond} beyond the margin"
    if not is_finite.all():
        text += f", {int((~is_finite).sum())} not finite"
    return text, panel.canvas


def _compute_margins(image: Rgb, positions_xy: Floats) -> Margins:
    """Return the margins for points outside the image: left, top, right, bottom, in pixels."""
    height, width = image.shape[:2]
    largest = MAX_MARGIN_SHARE * max(height, width)
    smallest = 0.03 * max(height, width)
    finite = positions_xy[np.isfinite(positions_xy).all(1)]
    x, y = finite.T if len(finite) else np.zeros((2, 1))
    excess = (-x.min(), -y.min(), x.max() - width + 1, y.max() - height + 1)
    left, top, right, bottom = (round(min(max(e, 0.0) + smallest, largest)) for e in excess)
    return left, top, right, bottom


def _draw_meshes(image: Rgb, layer: LayerOffsets) -> Rgb:
    """Draw the sampling grids of evenly spaced locations that hardly overlap."""
    panel = Panel.from_image(dim(image))
    deformed = _flatten_positions(compute_sampling_positions(layer))  # [G*T, 2 (x, y), Ho, Wo]
    plain = _flatten_positions(compute_sampling_positions(layer, is_plain=True))
    both = np.concatenate([deformed, plain])
    spans = np.ptp(np.where(np.isfinite(both), both, plain.mean(0)), axis=0)  # [2, Ho, Wo]
    sides = np.array(image.shape[1::-1])
    spacing = np.minimum(1.15 * np.median(spans, axis=(1, 2)), sides)
    geometry = layer.output_geometry
    height_out, width_out = deformed.shape[-2:]
    columns = _spread_indices(width_out, geometry.stride_px[1], spacing[0])
    rows = _spread_indices(height_out, geometry.stride_px[0], spacing[1])
    for row in rows:
        for column in columns:
            for positions, color, width in ((plain, PALE, 1), (deformed, YELLOW, 2)):
                taps = positions[:, :, row, column]
                for mesh in np.split(taps, layer.offset.shape[0]):
                    _draw_mesh(panel, mesh, layer.grid, color, width)
            location = plain[:, :, row, column].mean(0)
            panel.square((float(location[0]), float(location[1])), 4.0, GREEN)
    chosen = deformed[:, :, rows][..., columns]  # [G*T, 2, rows, columns]
    panel.dots(np.moveaxis(chosen, 1, -1).reshape(-1, 2), 3.5, RED)
    return panel.canvas


def _draw_mesh(panel: Panel, taps_xy: Floats, grid: TapGrid, color: Color, width: int) -> None:
    """Draw lines between adjacent taps of one location."""
    mesh = taps_xy.reshape(*grid.kernel_size, 2)
    for starts, ends in ((mesh[1:], mesh[:-1]), (mesh[:, 1:], mesh[:, :-1])):
        for ink, extra in ((INK, 2), (color, 0)):
            panel.segments(starts.reshape(-1, 2), ends.reshape(-1, 2), ink, width + extra)


def _draw_arrows(image: Rgb, displacement: Floats, geometry: MapGeometry) -> tuple[Rgb, float]:
    """Draw displacements [2 (dy, dx), Ho, Wo] as arrows; return the panel and the arrow scale."""
    panel = Panel.from_image(dim(image))
    spacing = 34 / panel.scale_xy[0]
    height_out, width_out = displacement.shape[-2:]
    rows = _spread_indices(height_out, geometry.stride_px[0], spacing)
    columns = _spread_indices(width_out, geometry.stride_px[1], spacing)
    chosen = displacement[:, rows][:, :, columns].reshape(2, -1).T[:, ::-1]  # (dx, dy)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    starts = np.stack([x, y], -1).reshape(-1, 2) * np.array(geometry.stride_px[::-1])
    starts = starts + np.array(geometry.origin_px[::-1])
    lengths = np.linalg.norm(chosen, axis=1)
    finite = lengths[np.isfinite(lengths)]
    typical = float(np.percentile(finite, 90)) if len(finite) else 0.0
    room = max(spacing, *geometry.stride_px)
    factors = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
    fitting = [f for f in factors if f * typical <= room] if typical > 1e-6 else [1.0]
    factor = fitting[-1] if fitting else factors[0]
    panel.dots(starts, 1.5, YELLOW)
    panel.arrows(starts, starts + factor * chosen, YELLOW)
    return panel.canvas, factor


def _draw_heat_map(
    image: Rgb,
    values: Floats,
    geometry: MapGeometry,
    color_map: int,
    mark: tuple[float, str] | None,
) -> Rgb:
    """Draw values [Ho, Wo] as a heat map with a color bar, interpolated between locations."""
    panel = Panel.from_image(image)
    low, high = _choose_range(values, 0.0 if mark is None else mark[0])
    heat = colorize(_interpolate(values, geometry, panel), low, high, color_map)
    bar = color_bar(heat.shape[0], low, high, color_map, "px", mark)
    return concatenate(engrave(heat, panel.canvas), bar)


def _interpolate(values: Floats, geometry: MapGeometry, panel: Panel) -> Floats:
    """Interpolate values [Ho, Wo] to the pixels of the panel, with nearest extrapolation."""
    axes = []
    for axis, size in enumerate(panel.canvas.shape[:2]):
        in_image = (np.arange(size) + 0.5) / panel.scale_xy[1 - axis] - 0.5
        axes.append((in_image - geometry.origin_px[axis]) / geometry.stride_px[axis])
    y, x = np.meshgrid(*axes, indexing="ij")
    return np.asarray(
        cv2.remap(
            values.astype(np.float32),
            x.astype(np.float32),
            y.astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        ),
        np.float64,
    )


def _choose_range(values: Floats, anchor: float) -> tuple[float, float]:
    """Return the ends of the color bar: the 1st and 99th percentiles, extended to `anchor`.

    An anchor that would take more than 2/3 of the bar is not included. Nearly equal values get a
    minimum range.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        finite = np.full(1, anchor)
    low, high = (float(v) for v in np.percentile(finite, (1, 99)))
    least = max(0.05 * high, 0.1)
    if high - low < least:
        low = max((low + high - least) / 2, 0.0)
        high = low + least
    reach = 2 * (high - low)
    if low - reach <= anchor <= high + reach:
        low, high = min(low, anchor), max(high, anchor)
    return low, high


def _spread_indices(size: int, stride_px: float, spacing_px: float) -> npt.NDArray[np.int64]:
    """Return centered indices of a map's axis that are at least `spacing_px` apart."""
    step = max(int(np.ceil(spacing_px / stride_px - 1e-9)), 1)
    count = max(size // step, 1)
    first = (size - 1 - (count - 1) * step) // 2
    return np.arange(count) * step + max(first, 0)


def _flatten_positions(positions: Tensor) -> Floats:
    """Reshape [G, T, 2 (y, x), H, W] to [G*T, 2 (x, y), H, W]."""
    return np.asarray(positions.flatten(0, 1).flip(1).numpy(), np.float64)


def _count_columns(image: Rgb, columns: int) -> int:
    """Return the number of columns; panels of tall images are in one row."""
    return 4 if image.shape[0] > 1.5 * image.shape[1] else columns


def _describe_grid(layer: LayerOffsets) -> str:
    dilation, stride = layer.grid.dilation, layer.input_geometry.stride_px
    return f"dilation {dilation[0]}, feature map stride {stride[0]:.4g} px"


def _format_range(values: Floats) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "no finite values"
    missing = "" if len(finite) == values.size else f" ({values.size - len(finite)} not finite)"
    mean, low, high = finite.mean(), finite.min(), finite.max()
    return f"mean {mean:.4g} px, range {low:.4g} to {high:.4g} px{missing}"
