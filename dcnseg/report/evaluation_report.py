"""The files of `dcnseg evaluate --out`; entry point `write_evaluation`."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from dcnseg.data.sample import Sample
from dcnseg.engine.run_folder import CONFUSION_CHART, PREVIEW, SCORES
from dcnseg.engine.run_images import write_preview, write_worst
from dcnseg.files import atomic_path, mark_output_folder
from dcnseg.inference.predictor import Predictor
from dcnseg.report.measures_report import write_measures
from dcnseg.scoring.counts import class_f1, class_iou, class_precision, class_recall
from dcnseg.scoring.scores import Scores
from dcnseg.visualize.charts import (
    draw_class_scores,
    draw_confusion,
    draw_region_filters,
    save_chart,
)
from dcnseg.visualize.measures.measuring import measure_offsets

IMAGES: Final = "images.csv"
CLASS_CHART: Final = "class_scores.png"
COUNT_CHART: Final = "confusion_counts.png"
WORST: Final = "worst.jpg"
REGION_CHART: Final = "region_filters.png"


def write_evaluation(
    out: Path, predictor: Predictor, samples: Sequence[Sample], scores: Scores, split: str
) -> list[Path]:
    """Write scores, charts and images of an evaluation, and return their paths.

    The offsets of a network with deformable layers are measured in another pass over the images.

    Args:
        out: The output folder.
        predictor: The evaluated predictor.
        samples: The evaluated images and masks.
        scores: The result of `evaluate` with details.
        split: Name of the split.
    """
    mark_output_folder(out)
    with atomic_path(out / SCORES) as temporary:
        content = {"split": split, **scores.to_detailed_dict()}
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _write_images(out / IMAGES, scores)
    kinds = {
        "IoU": class_iou(scores.counts),
        "precision": class_precision(scores.counts),
        "recall": class_recall(scores.counts),
        "F1": class_f1(scores.counts),
    }
    save_chart(draw_class_scores(kinds, scores.names), out / CLASS_CHART)
    save_chart(draw_confusion(scores.confusion, scores.names), out / CONFUSION_CHART)
    counts = draw_confusion(scores.confusion, scores.names, is_normalized=False)
    save_chart(counts, out / COUNT_CHART)
    write_preview(out / PREVIEW, predictor, samples, scores)
    write_worst(out / WORST, predictor, samples, scores)
    names = [SCORES, IMAGES, CLASS_CHART, CONFUSION_CHART, COUNT_CHART, PREVIEW, WORST]
    if scores.regions is not None:
        regions = scores.regions
        curves = {"region score": regions.by_score, "pixel confidence": regions.by_confidence}
        save_chart(draw_region_filters(curves), out / REGION_CHART)
        names.append(REGION_CHART)
    paths = [out / name for name in names]
    if predictor.model.deformable_layers():
        paths += write_measures(out, measure_offsets(predictor, samples, pixels_per_class=0))
    return paths


def _write_images(path: Path, scores: Scores) -> None:
    """Write a line per image, the worst first; a score that is not defined is empty."""
    header = ["image", "mean_iou", "boundary_iou", "pixel_accuracy"]
    images = sorted(scores.images, key=lambda image: np.nan_to_num(image.mean_iou, nan=2))
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([*header, *(f"iou {name}" for name in scores.names)])
        for image in images:
            values = [image.mean_iou, image.mean_boundary_iou, image.pixel_accuracy]
            values += class_iou(image.counts).tolist()
            cells = ("" if np.isnan(value) else f"{value:.6f}" for value in values)
            writer.writerow([image.name, *cells])
