"""The report of a comparison: `write_comparison` writes its table, chart and page."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any, Final

from dcnseg import __version__
from dcnseg.config import flatten_settings
from dcnseg.engine.compared_runs import Comparison, Difference, RunResult, VariantResult
from dcnseg.files import atomic_path
from dcnseg.report.measures_report import SUMMARY_COLUMNS, summarize_layers
from dcnseg.report.page import embed_chart, write_page
from dcnseg.scoring.bootstrap import RESAMPLES
from dcnseg.scoring.objects import SIZES
from dcnseg.visualize.charts import draw_comparison, save_chart

RESULTS: Final = "results.json"
CHART: Final = "comparison.png"
TABLE: Final = "comparison.csv"
REPORT: Final = "report.html"
ZEROED: Final = "mIoU, offsets zeroed"
SHUFFLED: Final = "mIoU, offsets shuffled"
CORRELATION: Final = "dilation and object size"
SCORE_COLUMNS: Final = (
    *("variant", "runs", "val mIoU", "mIoU", "lowest", "highest", "boundary IoU"),
    *SIZES,
)
COST_COLUMNS: Final = (
    *("parameters", "ms per image", "minutes of training"),
    *(ZEROED, SHUFFLED, CORRELATION),
)
COLUMNS: Final = (*SCORE_COLUMNS, *COST_COLUMNS)


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write results.json, comparison.csv, comparison.png and report.html into a folder."""
    rows = [summarize_variant(variant) for variant in comparison.variants]
    content = _to_json(comparison, rows)
    with atomic_path(out / RESULTS) as temporary:
        text = json.dumps(content, indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    _write_table(out / TABLE, rows)
    figure = draw_comparison(
        {variant.name: variant.mean_ious for variant in comparison.variants},
        {variant.name: _mean_by_size(variant) for variant in comparison.variants},
        {f"{d.variant} over {d.reference}": d.interval for d in comparison.differences},
    )
    save_chart(figure, out / CHART)
    offsets = _list_offset_rows(comparison)
    write_page(
        out / REPORT,
        "comparison.html",
        {
            "version": __version__,
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "title": f"Comparison of {len(rows)} variants",
            "comparison": comparison,
            "has_fixed": any(not variant.is_deformable for variant in comparison.variants),
            "resamples": RESAMPLES,
            "tables": {
                "Scores": _known_columns(SCORE_COLUMNS, rows),
                "Cost, and what the offsets contribute": [
                    "variant",
                    *_known_columns(COST_COLUMNS, rows),
                ],
            },
            "offset_rows": offsets,
            "offset_columns": [name for name in SUMMARY_COLUMNS if any(r[name] for r in offsets)],
            "offset_problems": _list_offset_problems(comparison),
            "rows": [{name: _format(value) for name, value in row.items()} for row in rows],
            "best": max(rows, key=lambda row: row["mIoU"])["variant"],
            "chart": embed_chart(figure, "Comparison"),
            "settings": flatten_settings(comparison.config).items(),
        },
    )


def _known_columns(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in names if not all(_is_nan(row[name]) for row in rows)]


def summarize_variant(variant: VariantResult) -> dict[str, Any]:
    """The row of a variant in the table, by COLUMNS; NaN where a value does not apply."""
    values = variant.mean_ious
    offsets = [run.offsets for run in variant.runs if run.offsets]
    replaced = {
        name: mean(o.mean_iou[mode] for o in offsets) if offsets else math.nan
        for name, mode in ((ZEROED, "zeroed"), (SHUFFLED, "shuffled"))
    }
    # The mean over the runs of the layer where it is strongest.
    layers = offsets[0].measures.rank_correlation if offsets else ()
    correlations = [o.measures.rank_correlation for o in offsets]
    means = [mean(found.get(layer, math.nan) for found in correlations) for layer in layers]
    known = [value for value in means if not math.isnan(value)]
    return {
        "variant": variant.name,
        "runs": len(variant.runs),
        "val mIoU": variant.val_mean_iou,
        "mIoU": mean(values),
        "lowest": min(values),
        "highest": max(values),
        "boundary IoU": variant.average(lambda run: run.scores.mean_boundary_iou),
        **_mean_by_size(variant),
        "parameters": variant.runs[0].num_parameters,
        "ms per image": round(variant.ms_per_image, 1),
        "minutes of training": round(variant.average(lambda run: run.training_seconds) / 60, 1),
        **replaced,
        CORRELATION: max(known, key=abs, default=math.nan),
    }


def _list_offset_rows(comparison: Comparison) -> list[dict[str, str]]:
    """The main measures of the layers of each variant with offsets, averaged over its runs."""
    rows = []
    for variant in comparison.variants:
        found = [run.offsets.measures for run in variant.runs if run.offsets]
        for row in summarize_layers(found) if found else ():
            cells = {name: _format(row[name]) for name in ("layer", *SUMMARY_COLUMNS)}
            rows.append({"variant": variant.name, **cells})
    return rows


def _list_offset_problems(comparison: Comparison) -> list[str]:
    """A sentence for each layer of a run whose offsets are dead or run away."""
    return [
        f"{run.run.folder}: {layer} {problem}."
        for variant in comparison.variants
        for run in variant.runs
        if run.offsets
        for layers, problem in (
            (run.offsets.measures.dead_layers, "is dead: its offsets never moved"),
            (run.offsets.measures.runaway_layers, "samples mostly outside the image"),
        )
        for layer in layers
    ]


def _mean_by_size(variant: VariantResult) -> dict[str, float]:
    by_size = [run.scores.iou_by_size for run in variant.runs]
    return {size: mean(entry[size][1] for entry in by_size) for size in SIZES}


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: "" if _is_nan(v) else v for k, v in row.items()} for row in rows)


def _to_json(comparison: Comparison, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "dcnseg": __version__,
        "split": comparison.split,
        "images": comparison.num_images,
        "baseline": comparison.baseline,
        "sentences": comparison.sentences(),
        "differences": [_difference_entry(d) for d in comparison.differences],
        "failed": dict(comparison.failed),
        "variants": [
            {key.replace(",", "").replace(" ", "_"): _null(row[key]) for key in COLUMNS}
            | {"run_results": [_run_entry(run) for run in variant.runs]}
            for row, variant in zip(rows, comparison.variants, strict=True)
        ],
    }


def _difference_entry(difference: Difference) -> dict[str, Any]:
    interval = difference.interval
    return {
        "variant": difference.variant,
        "reference": difference.reference,
        "mean_iou": _null(interval.difference),
        "low": _null(interval.low),
        "high": _null(interval.high),
        "is_conclusive": difference.is_conclusive,
    }


def _run_entry(run: RunResult) -> dict[str, Any]:
    scores = run.scores.to_detailed_dict()
    del scores["confusion"]  # large, and in the scores.json of `dcnseg evaluate`
    entry = {"run": str(run.run.folder), "seed": run.run.seed, **scores}
    if run.offsets:
        measures = run.offsets.measures
        for key, values in (
            ("offsets_replaced", run.offsets.mean_iou),
            ("dilation_rank_correlation", measures.rank_correlation),
        ):
            entry[key] = {name: _null(value) for name, value in values.items()}
        entry["offset_measures"] = measures.to_dict()
    return entry


def _format(value: Any) -> str:
    if _is_nan(value):
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _null(value: Any) -> Any:
    if _is_nan(value):
        return None
    return round(value, 6) if isinstance(value, float) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
