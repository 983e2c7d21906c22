"""The report and the charts of a training run.

Entry points: `write_run_report` and `write_run_charts`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dcnseg import __version__
from dcnseg.config import DataConfig, TrainConfig, flatten_settings
from dcnseg.data.class_map import ClassMap
from dcnseg.data.image_io import read_image
from dcnseg.engine.evaluation import find_evaluated_samples
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import (
    CONFUSION_CHART,
    CURVES_CHART,
    LABELS_CHART,
    PREVIEW,
    REPORT,
    TRAIN_BATCH,
    RunRecord,
    read_run,
    read_scores,
)
from dcnseg.errors import DcnsegError
from dcnseg.inference.predictor import Predictor
from dcnseg.report.page import embed_chart, embed_image, embed_image_file, write_page
from dcnseg.visualize.charts import (
    chart_to_rgb,
    draw_class_balance,
    draw_confusion,
    draw_training_curves,
    save_chart,
)
from dcnseg.visualize.figures.drawing import draw_effective_dilation, draw_offset_flow
from dcnseg.visualize.offsets import capture_offsets, limit_size

LABELS = {
    CURVES_CHART: "Training curves",
    CONFUSION_CHART: "Confusion matrix",
    LABELS_CHART: "Class balance",
}


def write_run_charts(run: Path) -> None:
    """Draw the training curves, the confusion matrix and the class balance of a run.

    Raises:
        CheckpointError: The folder is not a run folder, or its files are damaged.
        OSError: The charts cannot be written.
    """
    class_map = read_run(run).class_map
    for name, figure in _draw_charts(read_metrics(run), read_scores(run), class_map).items():
        save_chart(figure, run / name)


def write_run_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run as one HTML file, by default RUN/report.html, and return its path.

    Missing parts are skipped: figures of the offsets need the data folder, and runs of early
    versions have no confusion matrix.

    Raises:
        CheckpointError: The folder is not a run folder, or its files are damaged.
        OSError: The report cannot be written.
    """
    path = out or run / REPORT
    record, epochs, scores = read_run(run), read_metrics(run), read_scores(run)
    charts = {
        name: embed_chart(figure, LABELS[name])
        for name, figure in _draw_charts(epochs, scores, record.class_map).items()
    }
    content = {
        "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "title": f"Run {run.resolve().name}",
        "subtitle": _describe_network(record),
        "cards": _cards(epochs, scores),
        "curves": charts.get(CURVES_CHART),
        "classes": _class_rows(scores, record.class_map),
        "best_epoch": scores.get("epoch"),
        "confusion": charts.get(CONFUSION_CHART),
        # The previews of early versions show other images.
        "preview": scores
        and embed_image_file(run / PREVIEW, "Best, median and worst validation images"),
        "offsets": _offset_rows(epochs),
        **_offset_figures(run, record),
        "data_sentence": _describe_data(record),
        "balance": charts.get(LABELS_CHART),
        "train_batch": embed_image_file(run / TRAIN_BATCH, "The first training batch"),
        "repeat": describe_command(record.command),
        "next_commands": next_commands(run, record),
        "settings": _setting_rows(record),
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    write_page(path, "run.html", content)
    return path


def next_commands(run: Path, record: RunRecord) -> list[str]:
    """List the commands to run after training."""
    name = shlex.quote(str(run))
    data = shlex.quote(str(record.config.data.root))
    commands = [f"dcnseg predict {name} IMAGES --out predictions"]
    if record.split.get("test"):
        commands.insert(0, f"dcnseg evaluate {name} {data} --split test")
    if record.config.model.deform_layers:
        commands.append(f"dcnseg visualize-offsets {name} IMAGES --out offsets")
    return commands


def describe_command(arguments: Sequence[str]) -> str:
    """Return the command line of `dcnseg`, or "" if the run was not started by it."""
    if not arguments or Path(arguments[0]).name != "dcnseg":
        return ""
    return shlex.join(["dcnseg", *arguments[1:]])


def _draw_charts(
    epochs: Sequence[Mapping[str, Any]], scores: Mapping[str, Any], class_map: ClassMap
) -> dict[str, Figure]:
    """The charts for which there are values, by the name of their file."""
    charts = {}
    if epochs:
        charts[CURVES_CHART] = draw_training_curves(epochs, class_map)
    if scores:
        confusion = np.asarray(scores["confusion"])
        charts[CONFUSION_CHART] = draw_confusion(confusion, class_map.names)
        charts[LABELS_CHART] = draw_class_balance(np.asarray(scores["train_pixels"]), class_map)
    return charts


def _describe_network(record: RunRecord) -> str:
    model = record.config.model
    kind = "plain convolutions"
    if model.deform_layers:
        version = "v2" if model.modulated else "v1"
        kind = f"{model.deform_layers} deformable convolutions ({version})"
    decoder = "1x1 head" if model.architecture == "plain" else model.architecture
    return f"{decoder}, {model.encoder}, output stride {model.output_stride}, {kind}"


def _describe_data(record: RunRecord) -> str:
    parts = [f"{len(stems)} {name} images" for name, stems in record.split.items() if stems]
    names = record.class_map.names
    return f"{record.config.data.root}: {', '.join(parts)}; {len(names)} classes."


def _cards(epochs: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    cards = []
    if scores:
        cards += [
            (_score(scores["mean_iou"]), "validation mIoU"),
            (_score(scores["pixel_accuracy"]), "pixel accuracy"),
            (str(scores["epoch"]), "best epoch"),
        ]
        if "regions" in scores:
            cards.append((_score(scores["regions"]["ap50"]), "region AP at IoU 0.5"))
    seconds = sum(epoch.get("seconds", 0) for epoch in epochs)
    cards.append((_duration(seconds), f"for {len(epochs)} epochs"))
    return cards


def _class_rows(scores: Mapping[str, Any], class_map: ClassMap) -> list[dict[str, Any]]:
    if not scores:
        return []
    pixels = np.asarray(scores["confusion"]).sum(1).tolist()
    colors = class_map.index_colors().tolist()
    kinds = ("class_iou", "class_precision", "class_recall", "class_f1")
    return [
        {
            "name": name,
            "color": colors[i],
            "values": [_score(scores[kind][name]) for kind in kinds],
            "pixels": pixels[i],
        }
        for i, name in enumerate(class_map.names)
    ]


def _offset_rows(epochs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    known = [epoch["offsets"] for epoch in epochs if epoch.get("offsets")]
    keys = (("mean_px", " px"), ("p95_px", " px"), ("outside_share", ""))
    return [
        {
            "name": name,
            "values": [
                "not finite" if values[key] is None else f"{values[key]:.2f}{unit}"
                for key, unit in keys
            ],
        }
        for name, values in (known[-1] if known else {}).items()
    ]


def _offset_figures(run: Path, record: RunRecord) -> dict[str, Any]:
    """Figures of the last layer on the first validation image, or why there are none."""
    if not record.config.model.deform_layers:
        return {"offset_figures": [], "offset_problem": ""}
    try:
        sample = find_evaluated_samples(run, record.config.data.root, "val")[0]
        image = read_image(sample.image)
        predictor = Predictor.from_checkpoint(run)
        network_input = limit_size(predictor.prepare(image))
        layer = capture_offsets(predictor.model, network_input, image.shape[:2])[-1]
    except (DcnsegError, MemoryError) as error:  # the report does without the data or the weights
        return {"offset_figures": [], "offset_problem": f"No figures: {error}"}
    dilation = chart_to_rgb(draw_effective_dilation(image, [layer]))
    offsets = chart_to_rgb(draw_offset_flow(image, [layer]))
    captions = f"Effective dilation of {layer.title}", f"Offsets of {layer.title}"
    figures = [
        (embed_image(figure, caption), caption)
        for figure, caption in zip((dilation, offsets), captions, strict=True)
    ]
    return {"offset_figures": figures, "offset_problem": ""}


def _setting_rows(record: RunRecord) -> list[dict[str, Any]]:
    defaults = flatten_settings(TrainConfig(DataConfig(record.config.data.root)))
    return [
        {
            "name": name,
            "value": _format_setting(value),
            "source": record.sources.get(name, "default"),
            "is_default": value == defaults[name] and name != "data.root",
        }
        for name, value in flatten_settings(record.config).items()
    ]


def _format_setting(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
