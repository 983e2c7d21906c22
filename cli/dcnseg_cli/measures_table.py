"""The measures of offsets as tables; entry point `measures_tables`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from dcnseg.visualize.measures.results import (
    ALL,
    CLASS,
    DEAD_PX,
    DISTANCE,
    OBJECTS,
    SIZE,
    Dilation,
    GroupMeasures,
    LayerMeasures,
    OffsetMeasures,
)
from dcnseg_cli.terminal_text import escape_line

MAX_LAYERS = 3  # of the columns of a table; the files have all


def measures_tables(measures: OffsetMeasures) -> Iterator[Table]:
    """Yield the tables of effective dilation, of the sampling points and of receptive fields."""
    layers = measures.layers
    objects = "predicted objects" if measures.labels == "predictions" else "objects of the masks"
    title = f"Effective dilation in px, {measures.num_images} images, {objects}"
    yield _dilation_table(title, layers, SIZE)
    yield _dilation_table(
        "Effective dilation in px, by distance from the border, px", layers, DISTANCE
    )
    shown = layers[-MAX_LAYERS:]
    table = _new_table("Effective dilation in px, by class", "class", [_name(x) for x in shown])
    for name in layers[0].groups[CLASS]:
        cells = [_describe(layer.groups[CLASS][name].dilation) for layer in shown]
        table.add_row(_text(name), *cells)
    yield table
    yield _points_table(measures)
    yield _offsets_table(layers)
    if measures.fields:
        yield _fields_table(measures)


def describe_problems(measures: OffsetMeasures) -> Iterator[str]:
    """Yield a sentence for each layer whose offsets are dead, run away or are not finite."""
    for layer in measures.layers:
        if layer.is_dead:
            yield (
                f"{layer.name} is dead: its offsets never moved (root mean square "
                f"{layer.rms_offset_map_px:.3f}, below {DEAD_PX} px of its map)."
            )
        if layer.is_runaway:
            yield (
                f"{layer.name} runs away: {layer.outside_share:.0%} of its samples are outside the "
                f"image ({layer.plain_outside_share:.0%} of the plain grid)."
            )
        if layer.not_finite_share > 0:
            yield (
                f"{layer.name} has offsets that are not finite at {layer.not_finite_share:.1%} of "
                "its locations, which are left out."
            )


def _dilation_table(title: str, layers: Sequence[LayerMeasures], by: str) -> Table:
    table = _new_table(title, "layer", ["plain", *layers[0].groups[by]])
    for layer in layers:
        cells = [_describe(group.dilation) for group in layer.groups[by].values()]
        table.add_row(_text(_name(layer)), f"{layer.plain_dilation_px:.1f}", *cells)
    return table


def _points_table(measures: OffsetMeasures) -> Table:
    """The share of points on the object of their center; one row for each kind of points."""
    sizes = list(measures.layers[0].groups[SIZE])
    title = "Share of the sampling points on the object of their center"
    table = _new_table(title, "layer", ["points", "objects", *sizes, "outside image"])
    entries = [
        (_name(x), x.groups, (x.outside_share, x.plain_outside_share)) for x in measures.layers
    ]
    if measures.cascade:
        found = measures.cascade
        outside = found.outside_share, found.plain_outside_share
        entries.append((f"last {len(found.layers)} in cascade", found.groups, outside))
    for name, groups, (outside_share, plain_outside_share) in entries:
        for label, kind, share in (
            ("own", "own", outside_share),
            ("own, weighted by modulation", "modulated", math.nan),
            ("plain grid", "plain", plain_outside_share),
            ("shuffled", "shuffled", math.nan),
        ):
            chosen: list[GroupMeasures] = [groups[ALL][OBJECTS], *groups[SIZE].values()]
            values = [float(getattr(group.on_object, kind)) for group in chosen]
            if kind != "modulated" or not all(map(math.isnan, values)):
                row = _text(name) if kind == "own" else ""
                table.add_row(row, label, *map(_share, values), _share(share))
        table.add_section()
    return table


def _offsets_table(layers: Sequence[LayerMeasures]) -> Table:
    columns: Mapping[str, Sequence[str]] = {
        "length, map px": [f"{x.rms_offset_map_px:.2f}" for x in layers],
        "constant": [_share(x.shares.constant) for x in layers],
        "position": [_share(x.shares.position) for x in layers],
        "content": [_share(x.shares.content) for x in layers],
        "dilation and object size": [_number(x.rank_correlation) for x in layers],
    }
    if any(x.modulation for x in layers):
        columns = {
            **columns,
            "modulation": [f"{x.modulation.mean:.2f}" if x.modulation else "-" for x in layers],
            "below 0.1": [_share(x.modulation.low_share) if x.modulation else "-" for x in layers],
            "above 1.9": [_share(x.modulation.high_share) if x.modulation else "-" for x in layers],
        }
    table = _new_table("Offsets, and what their squared length consists of", "layer", columns)
    for i, layer in enumerate(layers):
        table.add_row(_text(_name(layer)), *(values[i] for values in columns.values()))
    return table


def _fields_table(measures: OffsetMeasures) -> Table:
    columns = ["pixels", "50 %", "90 %", "50 %, offsets zeroed", "90 %, offsets zeroed"]
    table = _new_table("Radius of the effective receptive field in px", "class", columns)
    for name, field in measures.fields.items():
        radii = field.half_px, field.most_px, field.zeroed_half_px, field.zeroed_most_px
        table.add_row(_text(name), str(field.pixels), *(_number(r, 1) for r in radii))
    return table


def _name(layer: LayerMeasures) -> str:
    """The name of a layer, short enough for the columns of a terminal."""
    return layer.name.removeprefix("encoder.")


def _new_table(title: str, first: str, columns: Sequence[str] | Mapping[str, object]) -> Table:
    table = Table(title=title)
    table.add_column(first)
    for column in columns:
        table.add_column(_text(column), justify="left" if column == "points" else "right")
    return table


def _describe(dilation: Dilation) -> str:
    """Mean and deviation, such as 24.2 ± 6.3."""
    return "-" if math.isnan(dilation.px) else f"{dilation.px:.1f} ± {dilation.deviation_px:.1f}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _text(name: str) -> str:
    return escape(escape_line(name))
