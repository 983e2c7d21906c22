"""The measures of offsets as files and rows; entry points `write_measures`, `summarize_layers`."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnseg.files import atomic_path
from dcnseg.visualize.charts import draw_offset_measures, save_chart
from dcnseg.visualize.measures.pixel_groups import SIZE_NAMES
from dcnseg.visualize.measures.results import (
    ALL,
    CLASS,
    EVERYWHERE,
    OBJECTS,
    SIZE,
    GroupMeasures,
    Groups,
    LayerMeasures,
    OffsetMeasures,
)
from dcnseg.visualize.report import to_json

JSON: Final = "measures.json"
TABLE: Final = "measures.csv"
CHART: Final = "offset_measures.png"

CASCADE: Final = "cascade"
NETWORK: Final = "network"
GROUP_COLUMNS: Final = (
    *("locations", "dilation_px", "deviation_px", "relative_dilation", "relative_deviation"),
    *("on_object", "plain_on_object", "shuffled_on_object", "modulated_on_object"),
)
LAYER_COLUMNS: Final = (
    *("plain_dilation_px", "outside_share", "plain_outside_share", "rms_offset_map_px"),
    *("constant_share", "position_share", "content_share", "rank_correlation"),
    *("mean_modulation", "low_modulation_share", "high_modulation_share", "not_finite_share"),
)
FIELD_COLUMNS: Final = (
    *("field_pixels", "radius_50_px", "radius_90_px"),
    *("zeroed_radius_50_px", "zeroed_radius_90_px"),
)
COLUMNS: Final = ("layer", "by", "group", *GROUP_COLUMNS, *LAYER_COLUMNS, *FIELD_COLUMNS)

# The columns of `summarize_layers` after the layer's name.
PLAIN_DILATION: Final = "plain, px"
ON_OBJECT: Final = ("on object", "on object, plain", "shuffled")
SUMMARY_COLUMNS: Final = (
    PLAIN_DILATION,
    *SIZE_NAMES,
    *ON_OBJECT,
    *("outside", "constant", "position", "content"),
)


def write_measures(out: Path, measures: OffsetMeasures) -> list[Path]:
    """Write measures.json, measures.csv and a chart into a folder, and return their paths."""
    with atomic_path(out / JSON) as temporary:
        temporary.write_text(to_json(measures.to_dict()), encoding="utf-8")
    with (
        atomic_path(out / TABLE) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in _list_rows(measures):
            writer.writerow({name: _format_cell(value) for name, value in row.items()})
    figure = draw_offset_measures(
        {
            layer.name: {
                size: (group.dilation.relative, group.dilation.relative_deviation)
                for size, group in layer.groups[SIZE].items()
            }
            for layer in measures.layers
        },
        {name: _on_object_shares(groups[ALL][OBJECTS]) for name, groups in _list_groups(measures)},
    )
    save_chart(figure, out / CHART)
    return [out / name for name in (JSON, TABLE, CHART)]


def summarize_layers(runs: Sequence[OffsetMeasures]) -> list[dict[str, Any]]:
    """The main numbers of each layer, averaged over runs; a row for the cascade comes last.

    The rows have "layer" and `SUMMARY_COLUMNS`, where the sizes hold the mean effective dilation in
    pixels; NaN where a value does not apply.
    """
    tables = [_summarize_run(run) for run in runs]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return [
        {"layer": name}
        | {column: _mean([table[name][column] for table in tables]) for column in SUMMARY_COLUMNS}
        for name in names
    ]


def _summarize_run(measures: OffsetMeasures) -> dict[str, dict[str, float]]:
    nothing = dict.fromkeys(SUMMARY_COLUMNS, math.nan)
    layers: dict[str, LayerMeasures] = {layer.name: layer for layer in measures.layers}
    found = {}
    for name, groups in _list_groups(measures):
        shares = _on_object_shares(groups[ALL][OBJECTS])
        row = dict(zip(ON_OBJECT, shares.values(), strict=True))
        if name in layers:
            layer = layers[name]
            row |= {PLAIN_DILATION: layer.plain_dilation_px, "outside": layer.outside_share}
            row |= layer.shares._asdict()
            row |= {size: group.dilation.px for size, group in groups[SIZE].items()}
        elif measures.cascade:
            row["outside"] = measures.cascade.outside_share
        found[name] = nothing | row
    return found


def _list_groups(measures: OffsetMeasures) -> list[tuple[str, Groups]]:
    """The groups of each layer, and those of the cascade."""
    found = [(layer.name, layer.groups) for layer in measures.layers]
    return [*found, (CASCADE, measures.cascade.groups)] if measures.cascade else found


def _on_object_shares(group: GroupMeasures) -> dict[str, float]:
    shares = group.on_object
    return {"own": shares.own, "plain": shares.plain, "shuffled": shares.shuffled}


def _list_rows(measures: OffsetMeasures) -> Iterator[dict[str, Any]]:
    """The rows of measures.csv; values of a whole layer are in its row of all locations."""
    whole = {layer.name: _layer_cells(layer) for layer in measures.layers}
    if measures.cascade:
        outside = measures.cascade.outside_share, measures.cascade.plain_outside_share
        whole[CASCADE] = dict(zip(("outside_share", "plain_outside_share"), outside, strict=True))
    for name, groups in _list_groups(measures):
        for by, of_kind in groups.items():
            for group, values in of_kind.items():
                row: dict[str, Any] = {"layer": name, "by": by, "group": group}
                row |= _group_cells(values)
                yield row | (whole[name] if (by, group) == (ALL, EVERYWHERE) else {})
    for name, field in measures.fields.items():
        radii = field.half_px, field.most_px, field.zeroed_half_px, field.zeroed_most_px
        cells = dict(zip(FIELD_COLUMNS, (field.pixels, *radii), strict=True))
        yield {"layer": NETWORK, "by": CLASS, "group": name, **cells}


def _group_cells(group: GroupMeasures) -> dict[str, float]:
    dilation, shares = group.dilation, group.on_object
    cells = (
        *(group.locations, dilation.px, dilation.deviation_px),
        *(dilation.relative, dilation.relative_deviation),
        *(shares.own, shares.plain, shares.shuffled, shares.modulated),
    )
    return dict(zip(GROUP_COLUMNS, cells, strict=True))


def _layer_cells(layer: LayerMeasures) -> dict[str, float]:
    modulation = [math.nan] * 3
    if layer.modulation:
        masks = layer.modulation
        modulation = [masks.mean, masks.low_share, masks.high_share]
    cells = (
        *(layer.plain_dilation_px, layer.outside_share, layer.plain_outside_share),
        *(layer.rms_offset_map_px, *layer.shares, layer.rank_correlation),
        *(*modulation, layer.not_finite_share),
    )
    return dict(zip(LAYER_COLUMNS, cells, strict=True))


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _format_cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
