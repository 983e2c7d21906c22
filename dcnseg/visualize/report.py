"""Offset figures and a JSON file for one image; entry point `visualize_image`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from dcnseg.data.class_map import ClassMap
from dcnseg.errors import ConfigError
from dcnseg.files import atomic_path
from dcnseg.visualize.charts import save_chart
from dcnseg.visualize.figures.drawing import draw_effective_dilation, draw_offset_flow
from dcnseg.visualize.figures.panels import Rgb
from dcnseg.visualize.figures.point_drawing import (
    draw_points,
    draw_sampling_points,
    write_animation,
)
from dcnseg.visualize.figures.region_drawing import draw_region_bins
from dcnseg.visualize.figures.summary import NetworkView, draw_summary
from dcnseg.visualize.offsets import (
    CASCADE_DEPTH,
    LayerOffsets,
    SamplingPoints,
    compute_effective_dilation,
)
from dcnseg.visualize.points import NamedPoint, TracedPoint, check_points, trace_point
from dcnseg.visualize.region_bins import RegionBins


def visualize_image(
    image: Rgb,
    views: Sequence[NetworkView],
    points: Sequence[NamedPoint],
    out_dir: Path,
    stem: str,
    *,
    regions: Sequence[RegionBins] | None = None,
    suffixes: Sequence[str] = (".png",),
    frames: int = 0,
) -> list[Path]:
    """Write figures of the offsets of a network for one image.

    Writes the summary `<stem>.png` and the folder `<stem>` with `dilation.png`, `flow.png`,
    `points.png`, `point_<x>_<y>.png` for each point, `regions.png` for the regions,
    `animation.webp`, and the same numbers in `offsets.json`. Files are written atomically and
    replace existing ones.

    Args:
        image: The image, uint8 RGB [H, W, 3].
        views: The network, and those to compare it with in the summary and in `points.png`.
        points: Points in pixels of `image`; (0, 0) is the center of its upper left pixel.
        out_dir: Output folder, created if needed.
        stem: Start of the file names, possibly with folders: "street/0001".
        regions: The bins of regions, if the region head of the network has offsets; without
            regions there is no figure of them, and the network may have no deformable layer.
        suffixes: Of the figures: ".png", ".svg" or both.
        frames: Number of frames of the animation; 0 for none.

    Returns:
        The written paths, in order.

    Raises:
        ConfigError: A point is outside the image, or there is a point or no `regions`, and the
            network has no deformable layer.
    """
    height, width = image.shape[:2]
    check_points([point.xy for point in points], (height, width))
    layers = views[0].layers
    if not layers and (points or regions is None):
        raise ConfigError(f"{views[0].name} has no deformable layer, so it has no offsets.")
    folder = out_dir / stem
    paths: list[Path] = []

    def write(path: Path, figure: Figure) -> None:
        for suffix in suffixes:
            paths.append(path.with_name(path.name + suffix))
            save_chart(figure, paths[-1])

    entries = []
    if layers:
        write(folder, draw_summary(image, views, points, folder.name))
        write(folder / "dilation", draw_effective_dilation(image, layers))
        write(folder / "flow", draw_offset_flow(image, layers))
    if points:
        networks = [(view.name, view.layers) for view in views if view.layers]
        write(folder / "points", draw_points(image, networks, points))
    for point in points:
        traced = trace_point(layers, point.xy)
        name = f"point_{point.xy[0]:g}_{point.xy[1]:g}"
        write(folder / name, draw_sampling_points(image, layers, point, traced))
        entries.append(_make_point_entry(layers, traced))
    if regions:
        write(folder / "regions", draw_region_bins(image, regions, views[0].class_map))
    if frames and layers:
        paths.append(folder / "animation.webp")
        write_animation(image, layers, frames, paths[-1])

    numbers: dict[str, Any] = {
        "image": {"height": height, "width": width},
        "layers": [_make_layer_entry(layer) for layer in layers],
        "points": entries,
    }
    if regions is not None:
        class_map = views[0].class_map
        numbers["regions"] = [_make_region_entry(entry, class_map) for entry in regions]
    paths.append(folder / "offsets.json")
    with atomic_path(paths[-1], is_durable=False) as temporary:
        temporary.write_text(to_json(numbers), encoding="utf-8")
    return paths


def to_json(numbers: Any) -> str:
    """Format as strict JSON with innermost lists on one line; NaN and infinity become null."""
    text = json.dumps(_round_floats(numbers), indent=1, allow_nan=False)
    innermost = r"\[\s+([^\[\]{}\"]*?)\s+\]"
    return re.sub(innermost, lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def _make_point_entry(layers: Sequence[LayerOffsets], traced: TracedPoint) -> dict[str, Any]:
    names = [layer.name for layer in layers[-CASCADE_DEPTH:]]
    return {
        "point_xy": traced.last.point_xy,
        "location_xy": traced.last.location_xy,
        "last_layer": {"layer": names[-1], **_make_samples_entry(traced.last, traced.last_plain)},
        "cascade": {"layers": names, **_make_samples_entry(traced.cascade, traced.plain)},
    }


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
