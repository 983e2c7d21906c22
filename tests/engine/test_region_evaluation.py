from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask

from dcnseg.config import ModelConfig, PredictConfig, Preprocessing
from dcnseg.data.pairing.folders import find_splits
from dcnseg.data.synthetic import SCENE_CLASSES
from dcnseg.engine.evaluation import evaluate
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.region_evaluation import collect_regions
from dcnseg.engine.training import train
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.regions import Region
from dcnseg.models.segmenter import build_segmenter
from tests.conftest import small_config

MODEL = ModelConfig(
    encoder="resnet18",
    encoder_depth=3,
    architecture="plain",
    region_head="deformable-rfcn",
    region_min_area=16,
)


def region(class_index: int, box: tuple[int, int, int, int], voted: int | None) -> Region:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return Region(class_index, area, box, box, 0.7, 0.6, voted, 0.8)


def test_objects_and_regions_of_an_image() -> None:
    labels = np.zeros((20, 30), np.uint8)
    labels[2:8, 3:10] = 1
    labels[12:14, 3:5] = 2  # too small
    labels[10:20, 20:30] = 255
    numbers = np.zeros((20, 30), np.int32)
    boxes = [(3, 2, 9, 8), (21, 12, 29, 18), (16, 12, 24, 18)]
    for number, (left, top, right, bottom) in enumerate(boxes, 1):
        numbers[top:bottom, left:right] = number
    numbers[12:18, 21:24] = 3
    found = tuple(region(1, box, vote) for box, vote in zip(boxes, (1, 2, None), strict=True))
    predicted = np.where(numbers > 0, np.uint8(1), np.uint8(0))
    prediction = Prediction(predicted, SCENE_CLASSES, regions=found, region_numbers=numbers)
    collected = collect_regions(labels, prediction, min_area=16)
    assert collected.object_classes == [1]
    np.testing.assert_array_equal(coco_mask.decode(collected.object_masks[0]), labels == 1)
    # The second region is ignored; half of the third is.
    assert collected.votes == [1, None]
    np.testing.assert_array_equal(coco_mask.decode(collected.masks[1]), numbers == 3)
    assert list(collected.scores) == [0.6, 0.6]
    assert list(collected.confidences) == [0.7, 0.7]


def test_the_scores_with_and_without_the_filter(scenes: Path) -> None:
    torch.manual_seed(0)
    model = build_segmenter(MODEL, SCENE_CLASSES.num_classes)
    predictor = Predictor(
        model,
        SCENE_CLASSES,
        Preprocessing(),
        device=torch.device("cpu"),
        config=PredictConfig(min_region_score=1.0),  # all regions go
    )
    samples = find_splits(scenes).val
    plain = evaluate(predictor.with_config(min_region_score=0.0), samples)
    assert plain.unfiltered_mean_iou is None
    assert plain.regions is not None
    scores = evaluate(predictor, samples)
    assert scores.unfiltered_mean_iou == plain.mean_iou
    assert scores.mean_iou != plain.mean_iou
    assert scores.regions is not None
    assert scores.regions.recall == plain.regions.recall  # of the unfiltered regions
    found = scores.to_dict()["regions"]
    assert found.keys() == plain.to_dict()["regions"].keys() >= {"ap50", "filter_score"}


def test_training_records_the_scores_of_the_regions(scenes: Path, tmp_path: Path) -> None:
    result = train(small_config(scenes, model=MODEL, epochs=1), tmp_path / "run")
    recorded = read_metrics(tmp_path / "run")[0]["regions"]
    assert recorded == result.scores["regions"]
    scores = evaluate(result.predictor(device="cpu"), find_splits(scenes).val)
    assert scores.to_dict()["regions"] == recorded
