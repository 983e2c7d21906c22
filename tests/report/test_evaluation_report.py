from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dcnseg.data.image_io import read_image
from dcnseg.data.pairing.folders import find_splits
from dcnseg.engine.evaluation import evaluate
from dcnseg.inference.predictor import Predictor
from dcnseg.report.evaluation_report import write_evaluation


def test_scores_of_classes_and_images(predictor: Predictor, scenes: Path, tmp_path: Path) -> None:
    samples = find_splits(scenes).val
    scores = evaluate(predictor, samples, has_details=True)
    paths = write_evaluation(tmp_path, predictor, samples, scores, "val")
    assert all(path.is_file() for path in paths)
    assert {"measures.json", "measures.csv"} <= {path.name for path in paths}
    measures = json.loads((tmp_path / "measures.json").read_text())
    assert measures["images"] == 3
    assert measures["fields"] == {}
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["split"] == "val"
    assert np.array(content["confusion"]).sum() == content["labelled_pixels"] == 3 * 64 * 96
    assert sum(entry["objects"] for entry in content["iou_by_size"].values()) > 3
    assert 0 < content["mean_boundary_iou"] < content["mean_iou"]
    with (tmp_path / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["image"] for row in rows} == {sample.stem for sample in samples}
    ious = [float(row["mean_iou"]) for row in rows]
    assert ious == sorted(ious)
    by_name = {image.name: image for image in scores.images}
    for row in rows:
        image = by_name[row["image"]]
        assert float(row["boundary_iou"]) == round(image.mean_boundary_iou, 6)
        of_class = [float(row[f"iou {name}"] or "nan") for name in scores.names]
        assert np.nanmean(of_class) == pytest.approx(image.mean_iou, abs=1e-5)
    for name in ("class_scores.png", "confusion_matrix.png", "preview.jpg", "worst.jpg"):
        assert read_image(tmp_path / name).size
