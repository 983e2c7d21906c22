"""Offset figures and a JSON file for one image; entry point `visualize_image`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dcnseg.data.class_map import ClassMap
from dcnseg.data.image_io import write_png
from dcnseg.errors import ConfigError
from dcnseg.files import atomic_path
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.visualize.canvas import Rgb
from dcnseg.visualize.drawing import (
    draw_effective_dilation,
    draw_offset_field,
    draw_sampling_points,
)
from dcnseg.visualize.offsets import (
    LayerOffsets,
    SamplingPoints,
    capture_offsets,
    compute_effective_dilation,
    trace_cascade,
)
from dcnseg.visualize.region_bins import RegionBins
from dcnseg.visualize.region_drawing import draw_region_bins

CASCADE_DEPTH = 3  # as in the paper's Figure 6: 9^3 = 729 samples
Point = tuple[float, float]


def visualize_image(
    model: nn.Module,
    network_input: Tensor,
    image: Rgb,
    points: Sequence[Point],
    out_dir: Path,
    stem: str,
    *,
    cascade_depth: int = CASCADE_DEPTH,
    regions: tuple[Sequence[RegionBins], ClassMap] | None = None,
) -> list[Path]:
    """Write figures of the offsets of `model` for one image.

    Writes `<stem>_<layer>_dilation.png` and `<stem>_<layer>_offsets.png` for each deformable layer,
    `<stem>_point_<x>_<y>.png` for each point, `<stem>_regions.png` for the regions, and
    `<stem>.json` with the same numbers. Files are written atomically and replace existing ones.

    Args:
        model: A network with deformable layers, in evaluation mode, on the input's device.
        network_input: The normalized, possibly resized image, [1, 3, h, w].
        image: The image, uint8 RGB [H, W, 3].
        points: Points (x, y) in pixels of `image`; (0, 0) is the center of its upper left pixel.
        out_dir: Output folder, created if needed.
        stem: Start of the file names, possibly with folders: "street/0001".
        cascade_depth: Maximum number of deformable layers to trace a point through.
        regions: The bins of regions and the classes, if the region head of `model` has offsets;
            without regions there is no figure of them.

    Returns:
        The written paths, in order.

    Raises:
        ConfigError: A point is outside the image, `cascade_depth` is below 1, or the model has
            no deformable layer; with `regions` and no point it needs none.
    """
    height, width = image.shape[:2]
    check_points(points, (height, width))
    if cascade_depth < 1:
        raise ConfigError(f"`cascade_depth` is {cascade_depth}; expected at least 1.")
    layers: list[LayerOffsets] = []
    if points or regions is None or any(isinstance(m, DeformConv2d) for m in model.modules()):
        layers = capture_offsets(model, network_input, (height, width))
    target = out_dir / stem
    paths = []

    def write(suffix: str, panel: Rgb) -> None:
        paths.append(target.with_name(f"{target.name}_{suffix}.png"))
        write_png(paths[-1], panel)

    for layer in layers:
        write(f"{layer.name}_dilation", draw_effective_dilation(image, layer))
        write(f"{layer.name}_offsets", draw_offset_field(image, layer))
    entries = []
    for point in points:
        panel, entry = _draw_point(image, layers[-cascade_depth:], point)
        write(f"point_{point[0]:g}_{point[1]:g}", panel)
        entries.append(entry)
    if regions is not None and regions[0]:
        write("regions", draw_region_bins(image, *regions))

    numbers: dict[str, Any] = {
        "image": {"height": height, "width": width},
        "layers": [_make_layer_entry(layer) for layer in layers],
        "points": entries,
    }
    if regions is not None:
        bins, class_map = regions
        numbers["regions"] = [_make_region_entry(entry, class_map) for entry in bins]
    paths.append(target.with_name(f"{target.name}.json"))
    with atomic_path(paths[-1], is_durable=False) as temporary:
        temporary.write_text(to_json(numbers), encoding="utf-8")
    return paths


def make_default_points(image_hw: tuple[int, int], columns: int = 3, rows: int = 3) -> list[Point]:
    """Return an evenly spaced grid of points (x, y), in image pixels, row by row."""
    height, width = image_hw
    return [
        (
            float((2 * column + 1) * width // (2 * columns)),
            float((2 * row + 1) * height // (2 * rows)),
        )
        for row in range(rows)
        for column in range(columns)
    ]


def check_points(points: Sequence[Point], image_hw: tuple[int, int]) -> None:
    """Raise a ConfigError that names the first point outside the image."""
    height, width = image_hw
    for x, y in points:
        # written to refuse NaN as well
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            raise ConfigError(
                f"The point {x:g},{y:g} is outside the image of {width}x{height} pixels; expected "
                f"x in 0..{width - 1} and y in 0..{height - 1}."
            )


def to_json(numbers: Any) -> str:
    """Format as strict JSON with innermost lists on one line; NaN and infinity become null."""
    text = json.dumps(_round_floats(numbers), indent=1, allow_nan=False)
    innermost = r"\[\s+([^\[\]{}\"]*?)\s+\]"
    return re.sub(innermost, lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def _draw_point(
    image: Rgb, layers: Sequence[LayerOffsets], point: Point
) -> tuple[Rgb, dict[str, Any]]:
    """Return the figure and the JSON entry of a point; `layers` are those of the cascade."""
    last_plain = trace_cascade(layers[-1:], point, is_plain=True)
    last = trace_cascade(layers[-1:], point)
    plain = trace_cascade(layers, point, is_plain=True)
    cascade = trace_cascade(layers, point)
    names = [layer.name for layer in layers]
    panel = draw_sampling_points(
        image, layers[-1].grid, (last_plain, last), (plain, cascade), names
    )
    entry = {
        "point_xy": point,
        "location_xy": last.location_xy,
        "last_layer": {"layer": names[-1], **_make_samples_entry(last, last_plain)},
        "cascade": {"layers": names, **_make_samples_entry(cascade, plain)},
    }
    return panel, entry


def _make_samples_entry(deformable: SamplingPoints, plain: SamplingPoints) -> dict[str, Any]:
    return {
        "positions_xy": deformable.positions_xy.tolist(),
        "modulation": deformable.weights.tolist(),
        "plain_positions_xy": plain.positions_xy.tolist(),
    }


def _make_layer_entry(layer: LayerOffsets) -> dict[str, Any]:
    """Return a layer's JSON entry; `_px` means image pixels, `_map_px` input map pixels."""
    groups, taps = layer.offset.shape[:2]
    dilation = compute_effective_dilation(layer)
    in_map = compute_effective_dilation(layer, in_image=False)
    stats = layer.statistics
    return {
        "name": layer.name,
        "offset_groups": groups,
        "taps": taps,
        "is_modulated": layer.mask is not None,
        "kernel_size": layer.grid.kernel_size,
        "stride": layer.grid.stride,
        "padding": layer.grid.padding,
        "dilation": layer.grid.dilation,
        "input_hw": layer.input_hw,
        "output_hw": tuple(layer.offset.shape[-2:]),
        "input_stride_px_yx": layer.input_geometry.stride_px,
        "input_origin_px_yx": layer.input_geometry.origin_px,
        "output_stride_px_yx": layer.output_geometry.stride_px,
        "output_origin_px_yx": layer.output_geometry.origin_px,
        "offset_length_map_px": {"mean": stats.mean_px, "p95": stats.p95_px},
        "outside_share": stats.outside_share,
        "plain_outside_share": stats.grid_outside_share,
        "effective_dilation_map_px": _summarize(in_map),
        "effective_dilation_px": {
            **_summarize(dilation),
            "plain": layer.plain_dilation_px,
            "map": dilation.tolist(),
        },
    }


def _make_region_entry(entry: RegionBins, class_map: ClassMap) -> dict[str, Any]:
    """Return a region's JSON entry; boxes are in image pixels from the corner of the image."""
    region = entry.region
    return {
        "class": class_map.names[region.class_index],
        "class_id": class_map.ids[region.class_index],
        "score": region.score,
        "area_px": region.area,
        "box_xyxy": region.box_xyxy,
        "mean_offset_px": float(entry.lengths_px.mean()),
        "bins_xyxy": entry.moved.tolist(),
        "plain_bins_xyxy": entry.plain.tolist(),
    }


def _summarize(values: Tensor) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _round_floats(value: Any) -> Any:
    """Round floats to four decimals; tuples become lists, NaN and infinity None."""
    if isinstance(value, dict):
        return {key: _round_floats(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round_floats(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
