"""Figures of the effective dilation and of the offset flow; panels of them for other figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.quiver import Quiver
from torch import Tensor

from dcnseg.visualize.charts import INK, PALETTE
from dcnseg.visualize.figures.panels import (
    FAINT_INK,
    MISSING,
    MOVED,
    NOTE_SIZE,
    PANEL_STYLE,
    PLAIN,
    TICK_SIZE,
    Floats,
    Rgb,
    Sheet,
    capitalize,
    dim,
    draw_dots,
    draw_lines,
    find_window,
    make_sheet,
    nice_above,
    show_image,
    show_map,
)
from dcnseg.visualize.offsets import (
    LayerOffsets,
    compute_effective_dilation,
    compute_sampling_positions,
)

DILATION_COLORS: Final = matplotlib.colormaps["RdBu_r"].with_extremes(bad=MISSING)
DILATION_LIMITS: Final = (25, 50, 75, 100, 150, 200, 300, 500, 1000)  # percent
GRIDS: Final = PALETTE[5]
ARROWS_PER_SIDE: Final = 13
ARROW_FACTORS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
GRIDS_PER_SIDE: Final = 6
BAR_WIDTH: Final = 1.45  # space for a color bar
WHEEL_WIDTH: Final = 1.6  # space for a color wheel
PADDING_NOTE: Final = (
    "Outside the dashed line, the kernel reaches beyond the feature map, so padding with zeros "
    "shapes the offsets."
)


@dataclass(frozen=True)
class FlowScale:
    """How offsets are drawn: the length of the full color in image pixels, and of the arrows."""

    limit_px: float
    arrow_factor: float


@matplotlib.rc_context(PANEL_STYLE)
def draw_effective_dilation(image: Rgb, layers: Sequence[LayerOffsets]) -> Figure:
    """Draw the image, and the effective dilation of each layer as a heat map over it."""
    window = find_window(image)
    limit = find_dilation_limit(layers)
    captions = ["Input image", *(capitalize(describe_dilation(layer)) for layer in layers)]
    notes = [
        "Effective dilation: mean distance between adjacent sampling points. White: as in the "
        "plain grid. All layers have the same scale.",
        PADDING_NOTE,
    ]
    columns = 2 if len(captions) <= 4 else 3
    keys = [0.0] * (min(columns, len(captions)) - 1) + [BAR_WIDTH]
    windows = [window] * len(captions)
    sheet = make_sheet("Effective dilation", notes, captions, windows, columns, keys)
    show_image(sheet.axes[0], image, window)
    for axes, layer in zip(sheet.axes[1:], layers, strict=True):
        drawn = show_dilation(axes, image, layer, limit)
    add_dilation_bar(sheet, len(keys) - 1, drawn, layers, limit)
    return sheet.figure


@matplotlib.rc_context(PANEL_STYLE)
def draw_offset_flow(image: Rgb, layers: Sequence[LayerOffsets]) -> Figure:
    """Draw sampling grids and the mean offsets, in colors and as arrows, of each layer."""
    spacing = max(image.shape[:2]) / GRIDS_PER_SIDE
    grids = [_choose_grids(layer, spacing) for layer in layers]
    scale = find_flow_scale(layers, image)
    window = find_window(image, *(taps.reshape(-1, 2) for taps, _ in grids))
    captions = []
    for layer in layers:
        stats = layer.statistics
        captions += [
            f"{capitalize(layer.title)}, sampling grids: {100 * stats.outside_share:.3g} % of the "
            f"points outside the feature map (plain {100 * stats.grid_outside_share:.3g} %)",
            f"{capitalize(layer.title)}, mean offset. {_describe_offsets(layer)}",
        ]
    windows = [window, find_window(image)] * len(layers)
    notes = [
        "Left: sampling grids (orange) of some output locations, and their plain grids (gray). "
        "Right: the mean offset of the taps at each output location, as color and as arrows. "
        "All layers have the same scale.",
    ]
    sheet = make_sheet("Offset flow", notes, captions, windows, 2, [0.0, WHEEL_WIDTH])
    for i, layer in enumerate(layers):
        panel, flow = sheet.axes[2 * i : 2 * i + 2]
        show_image(panel, dim(image), window)
        deformed, plain = grids[i]
        draw_lines(panel, make_meshes(plain, layer), PLAIN, 0.8)
        draw_lines(panel, make_meshes(deformed, layer), GRIDS, 1.2)
        draw_dots(panel, deformed.reshape(-1, 2), 4.5, MOVED)
        arrows = show_flow(flow, image, layer, scale)
        if i == 0:
            add_flow_key(sheet, 1, arrows, scale)
    return sheet.figure


def find_dilation_limit(layers: Sequence[LayerOffsets]) -> float:
    """Return the end of the color bar in percent of the plain dilation, the same for all layers.

    It is at least 25 %, and includes 95 % of the output locations without padding in each layer.
    """
    largest = 0.0
    for layer in layers:
        deviation = np.abs(_find_deviation(layer))
        inner = _find_inner(layer)
        values = deviation if inner is None else deviation[inner]
        finite = values[np.isfinite(values)]
        largest = max(largest, float(np.percentile(finite, 95)) if len(finite) else 0.0)
    return next((limit for limit in DILATION_LIMITS if limit >= largest), DILATION_LIMITS[-1])


def show_dilation(axes: Axes, image: Rgb, layer: LayerOffsets, limit: float) -> AxesImage:
    """Show the effective dilation of a layer in percent above the plain grid's."""
    deviation = _find_deviation(layer)
    values = np.where(np.isfinite(deviation), np.clip(deviation, -2 * limit, 2 * limit), np.nan)
    norm = Normalize(-limit, limit)
    drawn = show_map(axes, image, values, layer.output_geometry, DILATION_COLORS, norm)
    inner = _find_inner(layer)
    if inner is not None:
        edges = []
        geometry = layer.output_geometry
        for axis, part in enumerate(inner):
            stride, origin = geometry.stride_px[axis], geometry.origin_px[axis]
            edges += [origin + (part.start - 0.5) * stride, origin + (part.stop - 0.5) * stride]
        top, bottom, left, right = edges
        frame = Rectangle(
            (left, top), right - left, bottom - top, fill=False, linestyle=(0, (4, 3))
        )
        frame.set(edgecolor=INK, linewidth=1.0)
        axes.add_patch(frame)
    return drawn


def describe_dilation(layer: LayerOffsets) -> str:
    """Return the caption of a layer's effective dilation."""
    values = compute_effective_dilation(layer).numpy()
    height, width = values.shape
    return (
        f"{layer.title}: {_format_range(values)}; plain {layer.plain_dilation_px:.4g} px "
        f"(dilation {layer.grid.dilation[0]}, stride {layer.input_geometry.stride_px[0]:.4g} px). "
        f"{height}x{width} locations"
    )


def add_dilation_bar(
    sheet: Sheet, panel: int, drawn: AxesImage, layers: Sequence[LayerOffsets], limit: float
) -> None:
    """Add a color bar beside a panel, in percent and image pixels, with the plain grid marked."""
    axes = sheet.add_key(panel, 0.16, 2.2, down=0.3)
    deviations = np.concatenate([_find_deviation(layer).ravel() for layer in layers])
    is_below, is_above = bool((deviations < -limit).any()), bool((deviations > limit).any())
    extend = "both" if is_below and is_above else "min" if is_below else "max"
    extend = extend if is_below or is_above else "neither"
    bar = sheet.figure.colorbar(drawn, cax=axes, extend=extend)
    plains = sorted({round(layer.plain_dilation_px, 3) for layer in layers})
    ticks = [percent for percent in np.linspace(-limit, limit, 11) if percent >= -100]
    labels = []
    for percent in ticks:
        pixels = " / ".join(f"{plain * (1 + percent / 100):.3g}" for plain in plains[:3])
        change = "plain" if abs(percent) < 1e-6 else f"{percent:+.0f} %"
        labels.append(f"{change}, {pixels} px" if len(plains) <= 3 else change)
    bar.set_ticks(ticks, labels=labels)
    axes.set_ylim(max(-limit, -100.0), limit)
    axes.tick_params(labelsize=TICK_SIZE, length=3)
    axes.set_title("Dilation", loc="left", size=NOTE_SIZE, pad=8)


def find_flow_scale(layers: Sequence[LayerOffsets], image: Rgb) -> FlowScale:
    """Return the scale for the mean offsets of layers: 99 % are below the full color."""
    lengths = [np.linalg.norm(_find_mean_offset(layer), axis=0).ravel() for layer in layers]
    finite = np.concatenate([np.zeros(1), *lengths])
    finite = finite[np.isfinite(finite)]
    typical, largest = (float(v) for v in np.percentile(finite, (90, 99)))
    room = max(image.shape[:2]) / ARROWS_PER_SIDE
    fitting = [factor for factor in ARROW_FACTORS if factor * typical <= room]
    factor = 1.0 if typical < 1e-6 else fitting[-1] if fitting else ARROW_FACTORS[0]
    return FlowScale(nice_above(max(largest, 0.1)), factor)


def show_flow(axes: Axes, image: Rgb, layer: LayerOffsets, scale: FlowScale) -> Quiver:
    """Show the mean offset at each output location as color, and at some as an arrow."""
    mean = _find_mean_offset(layer)  # [2 (dy, dx), Ho, Wo]
    geometry = layer.output_geometry
    show_map(axes, image, _color_flow(mean, scale.limit_px), geometry)
    spacing = max(image.shape[:2]) / ARROWS_PER_SIDE
    rows, columns = (
        _spread(size, size * stride / spacing)
        for size, stride in zip(mean.shape[1:], geometry.stride_px, strict=True)
    )
    y, x = (
        origin + stride * indices
        for origin, stride, indices in zip(
            geometry.origin_px, geometry.stride_px, (rows, columns), strict=True
        )
    )
    dy, dx = np.ma.masked_outside(mean[:, rows][:, :, columns], -1e5, 1e5)
    return axes.quiver(
        *np.meshgrid(x, y),
        np.ma.masked_invalid(dx),
        np.ma.masked_invalid(dy),
        angles="xy",
        scale_units="xy",
        scale=1 / scale.arrow_factor,
        width=0.006,
        color=INK,
        edgecolor="white",
        linewidth=0.5,
        zorder=4,
    )


def add_flow_key(sheet: Sheet, panel: int, arrows: Quiver, scale: FlowScale) -> None:
    """Add a color wheel and the length of an arrow beside a panel."""
    axes = sheet.add_key(panel, 1.1, 1.1, right=0.2, down=0.25)
    axis = np.linspace(-1.02, 1.02, 161)
    dx, dy = np.meshgrid(axis, axis)
    is_outside = np.hypot(dx, dy)[..., None] > 1
    colors = np.where(is_outside, 1.0, _color_flow(np.stack([dy, dx]), 1.0))
    axes.imshow(colors, extent=(-1.02, 1.02, 1.02, -1.02), interpolation="bilinear")
    angles = np.linspace(0, 2 * np.pi, 100)
    axes.plot(np.cos(angles), np.sin(angles), color=FAINT_INK, linewidth=0.8)
    axes.plot([0, 1], [0, 0], color=INK, linewidth=0.8)
    axes.text(0.5, -0.08, f"{scale.limit_px:g} px", ha="center", size=TICK_SIZE)
    axes.set_axis_off()
    axes.set_title("Mean offset", loc="left", size=NOTE_SIZE, pad=4)
    length = scale.limit_px
    while length * scale.arrow_factor * 13 > max(sheet.axes[panel].get_xlim()) * 5:
        length /= 2
    text = f"{length:g} px" + (
        "" if scale.arrow_factor == 1 else f", drawn x{scale.arrow_factor:g}"
    )
    width, height = sheet.figure.get_size_inches()
    x, y = sheet.corners[panel]
    place = (x + 0.75) / width, 1 - (y + 1.6) / height
    sheet.axes[panel].quiverkey(
        arrows,
        *place,
        length,
        text,
        coordinates="figure",
        labelpos="S",
        fontproperties={"size": TICK_SIZE},
    )


def _find_deviation(layer: LayerOffsets) -> Floats:
    """The effective dilation in percent above the plain grid's, [Ho, Wo]."""
    dilation = np.asarray(compute_effective_dilation(layer).numpy(), np.float64)
    return 100 * (dilation / layer.plain_dilation_px - 1)


def _find_mean_offset(layer: LayerOffsets) -> Floats:
    """The mean offset (dy, dx) of all taps and groups in image pixels, [2, Ho, Wo]."""
    stride_px = np.array(layer.input_geometry.stride_px)[:, None, None]
    return np.asarray(layer.offset.double().mean((0, 1)).numpy() * stride_px)


def _find_inner(layer: LayerOffsets) -> tuple[slice, slice] | None:
    """The rows and columns of the output locations whose plain grid is within the input map."""
    grid, parts = layer.grid, []
    for axis in range(2):
        padding, stride = grid.padding[axis], grid.stride[axis]
        reach = grid.dilation[axis] * (grid.kernel_size[axis] - 1)
        first = -(-padding // stride)
        end = (layer.input_hw[axis] - 1 - reach + padding) // stride + 1
        parts.append(slice(first, end))
    return (parts[0], parts[1]) if all(part.start < part.stop for part in parts) else None


def _color_flow(offsets: Floats, limit: float) -> Floats:
    """Color offsets [2 (dy, dx), H, W]: direction is hue, length is saturation."""
    dy, dx = np.nan_to_num(offsets, posinf=0, neginf=0)
    hue = (np.arctan2(dy, dx) / (2 * np.pi)) % 1.0
    saturation = np.clip(np.hypot(dy, dx) / limit, 0, 1)
    colors = np.asarray(hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], -1)))
    colors[~np.isfinite(offsets).all(0)] = to_rgb(MISSING)
    return colors


def _choose_grids(layer: LayerOffsets, spacing: float) -> tuple[Floats, Floats]:
    """Sampling grids of at least 2x2 locations that hardly overlap, deformed and plain.

    They are at least `spacing` image pixels apart if there is room. Each is [N, G, T, 2 (x, y)].
    """
    deformed = _flip(compute_sampling_positions(layer))
    plain = _flip(compute_sampling_positions(layer, is_plain=True))
    both = np.concatenate([deformed, plain])
    spans = np.ptp(np.where(np.isfinite(both), both, plain.mean((0, 1))), axis=(0, 1))
    median = np.median(spans, axis=(1, 2))[::-1]  # [2 (y, x)]
    rows, columns = (
        _spread(size, size * stride / max(1.15 * span, spacing))
        for size, stride, span in zip(
            layer.offset.shape[-2:], layer.output_geometry.stride_px, median, strict=True
        )
    )

    def choose(positions: Floats) -> Floats:
        chosen = positions[..., rows, :][..., columns]  # [G, T, 2, rows, columns]
        return np.moveaxis(chosen, (3, 4), (0, 1)).reshape(-1, *positions.shape[:3])

    return choose(deformed), choose(plain)


def make_meshes(taps_xy: Floats, layer: LayerOffsets) -> Floats:
    """Segments [N, 2, 2] between adjacent taps; `taps_xy` is [..., T, 2]."""
    mesh = taps_xy.reshape(-1, *layer.grid.kernel_size, 2)
    pairs = (mesh[:, 1:], mesh[:, :-1]), (mesh[:, :, 1:], mesh[:, :, :-1])
    return np.concatenate([np.stack(pair, -2).reshape(-1, 2, 2) for pair in pairs])


def _spread(size: int, count: float) -> npt.NDArray[np.int64]:
    """Evenly spread indices of an axis: about `count`, but at least two where there are two."""
    number = int(np.clip(count + 1e-9, min(2, size), size))
    return ((np.arange(number) + 0.5) * size / number).astype(np.int64)


def _flip(positions: Tensor) -> Floats:
    """Convert [..., 2 (y, x), H, W] to (x, y)."""
    return np.asarray(positions.flip(-3).numpy(), np.float64)


def _describe_offsets(layer: LayerOffsets) -> str:
    stride_px = np.array(layer.input_geometry.stride_px)[:, None, None]
    lengths = np.linalg.norm(layer.offset.double().numpy() * stride_px, axis=2)
    return f"Length of the single offsets: {_format_range(lengths)}"


def _format_range(values: Floats) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "no finite values"
    missing = "" if len(finite) == values.size else f" ({values.size - len(finite)} not finite)"
    mean, low, high = finite.mean(), finite.min(), finite.max()
    return f"mean {mean:.3g} px, {low:.3g} to {high:.3g} px{missing}"
