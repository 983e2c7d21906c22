"""Images of what the offsets do: dilation, offset field, sampling points. RGB uint8 arrays."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor

from dcnseg.ops.offset_stats import TapGrid
from dcnseg.visualize.canvas import (
    INK,
    WHITE,
    Color,
    Floats,
    Margins,
    Panel,
    Rgb,
    beside,
    color_bar,
    colorize,
    compose,
    dim,
    engrave,
)
from dcnseg.visualize.geometry import MapGeometry
from dcnseg.visualize.offsets import (
    LayerOffsets,
    SamplingPoints,
    effective_dilation,
    sampling_positions,
)

RED: Color = (235, 40, 40)
GREEN: Color = (40, 230, 70)
YELLOW: Color = (255, 214, 64)
PALE: Color = (200, 205, 215)
DILATION_COLORS = cv2.COLORMAP_VIRIDIS
LENGTH_COLORS = cv2.COLORMAP_INFERNO
MAX_MARGIN_SHARE = 0.75
"""The margin around the image is at most this share of its longer side on each side."""


def draw_effective_dilation(image: Rgb, layer: LayerOffsets) -> Rgb:
    """The image, and over it the effective dilation as a heat map with a color bar."""
    dilation = effective_dilation(layer).numpy()
    plain = layer.plain_dilation_px
    heat = _heat_panel(
        image, dilation, layer.output_geometry, DILATION_COLORS, (plain, f"plain {plain:.4g}")
    )
    notes = [
        "Mean distance between adjacent sampling points, in pixels of the image.",
        f"Here: {_range_text(dilation)}. Plain grid: {plain:.4g} px ({_grid_text(layer)}).",
    ]
    panels = [("image", Panel.from_image(image).canvas), ("effective dilation", heat)]
    return compose(panels, _num_columns(image, 2), f"{layer.name}: effective dilation", notes)


def draw_offset_field(image: Rgb, layer: LayerOffsets) -> Rgb:
    """Four panels: the image, sampling meshes, mean displacements as arrows, lengths as heat."""
    offset = layer.offset.double().numpy()  # [G, T, 2, Ho, Wo]
    stride_px = np.array(layer.input_geometry.stride_px)[:, None, None]
    displacement = offset.mean((0, 1)) * stride_px  # [2, Ho, Wo]
    length = np.linalg.norm(offset * stride_px, axis=2).mean((0, 1))
    arrows, factor = _arrow_panel(image, displacement, layer.output_geometry)
    scale_text = "to scale" if factor == 1 else f"drawn {factor:g} times as long"
    panels = [
        ("image", Panel.from_image(image).canvas),
        (
            "sampling grids; plain ones in gray",
            _mesh_panel(image, layer),
        ),
        (f"mean displacement, {scale_text}", arrows),
        (
            "mean length of the offsets",
            _heat_panel(image, length, layer.output_geometry, LENGTH_COLORS, None),
        ),
    ]
    stats = layer.statistics
    notes = [
        f"Length of the offsets: {_range_text(length)}. In pixels of the layer's map "
        f"({_grid_text(layer)}): mean {stats.mean_px:.3g}, 95th percentile {stats.p95_px:.3g}.",
        f"Samples outside the map: {stats.outside_share:.1%}; of the plain grid, by its padding: "
        f"{stats.grid_outside_share:.1%}.",
    ]
    return compose(panels, _num_columns(image, 2), f"{layer.name}: offsets", notes)


def draw_sampling_points(
    image: Rgb,
    grid: TapGrid,
    last_layer: tuple[SamplingPoints, SamplingPoints],
    cascade: tuple[SamplingPoints, SamplingPoints],
    layer_names: Sequence[str],
) -> Rgb:
    """The samples of one output location: last layer above, cascade below; plain grid left.

    The receptive location is a green square and the samples are red. Samples outside the image
    are drawn in a margin around it, at most `MAX_MARGIN_SHARE` wide; those beyond it are counted.

    Args:
        image: The image.
        grid: Grid of the last layer.
        last_layer: Its samples: plain grid, deformable.
        cascade: Samples of several layers in cascade: plain grid, deformable.
        layer_names: Names of the cascade's layers, in forward order.
    """
    points = (*last_layer, *cascade)
    margins = _margins(image, np.concatenate([p.positions_xy.numpy() for p in points]))
    panels = []
    for samples, kind in zip(last_layer, ("plain grid", "deformable"), strict=True):
        panel = Panel.from_image(image, margins)
        positions = samples.positions_xy.numpy()
        for mesh in np.split(positions, len(positions) // grid.num_taps):
            _draw_mesh(panel, mesh, grid, WHITE, 1)
        panels.append(_samples_panel(panel, samples, 6.0, f"last layer, {kind}"))
    for samples, kind in zip(cascade, ("plain grid", "deformable"), strict=True):
        panel = Panel.from_image(image, margins)
        text = f"last {len(layer_names)} layers in cascade, {kind}"
        radius = 3.0 * min(1.0, (1000 / len(samples.positions_xy)) ** 0.25)
        panels.append(_samples_panel(panel, samples, radius, text))
    (x, y), (location_x, location_y) = last_layer[0].point_xy, last_layer[0].location_xy
    title = f"sampling points of ({x:g}, {y:g})"
    notes = [
        f"Green: the output location nearest to the point, at ({location_x:g}, {location_y:g}). "
        "Red: where it samples, hatched where there is no image.",
        "Layers: " + ", ".join(layer_names) + ".",
    ]
    if any((p.weights != 1).any() for p in points):
        notes[0] += " The area of a dot stands for its modulation."
    return compose(panels, _num_columns(image, 2), title, notes)


def _samples_panel(
    panel: Panel, samples: SamplingPoints, radius: float, caption: str
) -> tuple[str, Rgb]:
    """Draw samples, larger where the modulation is stronger, and say how many there are."""
    positions = samples.positions_xy.numpy()
    weights = samples.weights.double().numpy()
    # The area stands for the weight, 1 being the plain convolution's; never quite invisible.
    radii = radius * np.sqrt(np.clip(np.nan_to_num(weights), 0.08, 2.0))
    num_distinct = len(np.unique(np.round(positions, 3), axis=0))
    # Few dots get an edge to stand out; hundreds would cover the image with it.
    panel.dots(positions, radii, RED, WHITE if num_distinct <= 100 else None)
    panel.square(samples.location_xy, 9.0, GREEN)
    text = f"{caption}: {len(positions)} samples"
    if num_distinct < len(positions):
        text += f" at {num_distinct} places"
    is_finite = np.isfinite(positions).all(1)
    num_beyond = int((is_finite & ~panel.is_within(positions)).sum())
    if num_beyond:
        text += f", {num_beyond} beyond the margin"
    if not is_finite.all():
        text += f", {int((~is_finite).sum())} not finite"
    return text, panel.canvas


def _margins(image: Rgb, positions_xy: Floats) -> Margins:
    """Room for the samples outside the image, left, top, right and bottom, in its pixels."""
    height, width = image.shape[:2]
    longest = MAX_MARGIN_SHARE * max(height, width)
    least = 0.03 * max(height, width)
    finite = positions_xy[np.isfinite(positions_xy).all(1)]
    x, y = finite.T if len(finite) else np.zeros((2, 1))
    excess = (-x.min(), -y.min(), x.max() - width + 1, y.max() - height + 1)
    left, top, right, bottom = (round(min(max(e, 0.0) + least, longest)) for e in excess)
    return left, top, right, bottom


def _mesh_panel(image: Rgb, layer: LayerOffsets) -> Rgb:
    """The sampling grid at a lattice of locations, so spaced that neighbors hardly overlap."""
    panel = Panel.from_image(dim(image))
    deformed = _flat_positions(sampling_positions(layer))  # [G*T, 2 (x, y), Ho, Wo]
    plain = _flat_positions(sampling_positions(layer, is_plain=True))
    both = np.concatenate([deformed, plain])
    spans = np.ptp(np.where(np.isfinite(both), both, plain.mean(0)), axis=0)  # [2, Ho, Wo]
    sides = np.array(image.shape[1::-1])
    spacing = np.minimum(1.15 * np.median(spans, axis=(1, 2)), sides)
    geometry = layer.output_geometry
    height_out, width_out = deformed.shape[-2:]
    columns = _lattice(width_out, geometry.stride_px[1], spacing[0])
    rows = _lattice(height_out, geometry.stride_px[0], spacing[1])
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
    """Join the T samples of one location as neighbors in the kernel."""
    mesh = taps_xy.reshape(*grid.kernel_size, 2)
    for starts, ends in ((mesh[1:], mesh[:-1]), (mesh[:, 1:], mesh[:, :-1])):
        for ink, extra in ((INK, 2), (color, 0)):
            panel.segments(starts.reshape(-1, 2), ends.reshape(-1, 2), ink, width + extra)


def _arrow_panel(image: Rgb, displacement: Floats, geometry: MapGeometry) -> tuple[Rgb, float]:
    """Displacements [2 (dy, dx), Ho, Wo] as arrows at a lattice of locations, and their scale."""
    panel = Panel.from_image(dim(image))
    spacing = 34 / panel.scale_xy[0]
    height_out, width_out = displacement.shape[-2:]
    rows = _lattice(height_out, geometry.stride_px[0], spacing)
    columns = _lattice(width_out, geometry.stride_px[1], spacing)
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


def _heat_panel(
    image: Rgb,
    values: Floats,
    geometry: MapGeometry,
    color_map: int,
    mark: tuple[float, str] | None,
) -> Rgb:
    """Values [Ho, Wo] as colors over the gray image, interpolated between the locations."""
    panel = Panel.from_image(image)
    low, high = _value_range(values, 0.0 if mark is None else mark[0])
    heat = colorize(_spread(values, geometry, panel), low, high, color_map)
    bar = color_bar(heat.shape[0], low, high, color_map, "px", mark)
    return beside(engrave(heat, panel.canvas), bar)


def _spread(values: Floats, geometry: MapGeometry, panel: Panel) -> Floats:
    """Values of the locations at every pixel of the panel; the nearest beyond the outermost."""
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


def _value_range(values: Floats, anchor: float) -> tuple[float, float]:
    """Ends of the color bar: the middle 98 % of the values, and `anchor` unless it is far away.

    An anchor that took more than two thirds of the bar would leave the values in one color; values
    that are all but equal get a bar around them, not a bar of rounding errors.
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


def _lattice(size: int, stride_px: float, spacing_px: float) -> npt.NDArray[np.int64]:
    """Indices of a map's axis at least `spacing_px` apart, centered."""
    step = max(int(np.ceil(spacing_px / stride_px - 1e-9)), 1)
    count = max(size // step, 1)
    first = (size - 1 - (count - 1) * step) // 2
    return np.arange(count) * step + max(first, 0)


def _flat_positions(positions: Tensor) -> Floats:
    """[G, T, 2 (y, x), H, W] as [G*T, 2 (x, y), H, W]."""
    return np.asarray(positions.flatten(0, 1).flip(1).numpy(), np.float64)


def _num_columns(image: Rgb, columns: int) -> int:
    """Panels of a tall image stand in one row."""
    return 4 if image.shape[0] > 1.5 * image.shape[1] else columns


def _grid_text(layer: LayerOffsets) -> str:
    dilation, stride = layer.grid.dilation, layer.input_geometry.stride_px
    return f"dilation {dilation[0]}, a pixel of the map is {stride[0]:.4g} px"


def _range_text(values: Floats) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "no finite value"
    missing = "" if len(finite) == values.size else f" ({values.size - len(finite)} not finite)"
    mean, low, high = finite.mean(), finite.min(), finite.max()
    return f"mean {mean:.4g} px, from {low:.4g} to {high:.4g} px{missing}"
