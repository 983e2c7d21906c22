from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dcnseg.config import PredictConfig
from dcnseg.data.synthetic import SCENE_CLASSES
from dcnseg.engine.evaluation import evaluate_run
from dcnseg.errors import ConfigError
from tests.cli.test_predict import OVERFLOWING
from tests.conftest import Invoke, rewrite_weights
from tests.region_network import save_region_weights


def test_table(invoke: Invoke, run: Path, scenes: Path) -> None:
    result = invoke("evaluate", run, scenes, "--device=cpu")
    assert result.exit_code == 0, result.stderr
    scores = evaluate_run(run, scenes, "val", device="cpu").to_dict()
    for name, score in (
        ("coral", scores["class_iou"]["coral"]),
        ("mean IoU", scores["mean_iou"]),
        ("pixel accuracy", scores["pixel_accuracy"]),
    ):
        assert re.search(rf"{name} +│ +{score:.3f} ", result.stdout)


def test_json_has_the_scores_of_the_split(invoke: Invoke, run: Path, scenes: Path) -> None:
    result = invoke("evaluate", run, scenes, "--split=test", "--json", "--device=cpu")
    scores = evaluate_run(run, scenes, "test", device="cpu").to_dict()
    assert json.loads(result.stdout) == {"split": "test", **scores}


def test_augmentation_changes_the_prediction(invoke: Invoke, run: Path, scenes: Path) -> None:
    plain, augmented = (
        json.loads(invoke("evaluate", run, scenes, "--json", "--device=cpu", *extra).stdout)
        for extra in ((), ("--flip", "--scales=0.75,1.25"))
    )
    assert plain["mean_iou"] != augmented["mean_iou"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("{tmp} {scenes}", 1, "has no best.safetensors"),
        ("{run} {scenes} --split=dev", 2, "--split is 'dev'"),
        ("{run} {scenes} --scales=0", 2, "--scales is 0; expected"),
        ("{run} {scenes} --min-region-score=0.1", 2, "This network has no region head"),
        ("{run} {tmp}/none", 3, "none: does not exist."),
        ("{scenes} {run}", 2, "Try: dcnseg evaluate {run} {scenes}"),
        ("{scenes} {run}/best.safetensors", 2, "is not a run, but {run}/best.safetensors is. "),
    ],
)
def test_errors(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path, arguments: str, code: int, text: str
) -> None:
    paths = {"run": run, "scenes": scenes, "tmp": tmp_path}
    result = invoke("evaluate", *arguments.format(**paths).split())
    assert result.exit_code == code
    assert text.format(**paths) in result.stderr


def test_output_that_is_not_finite_names_the_image(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    diverged = rewrite_weights(run, tmp_path / "bad.safetensors", {}, OVERFLOWING)
    result = invoke("evaluate", diverged, scenes, "--device=cpu")
    assert result.exit_code == 1
    first = scenes / "val" / "images" / "scene_0000"
    assert f"Error: {first}" in result.stderr
    assert "the network's output has values that are not finite" in result.stderr


def test_scores_are_those_of_all_pixels(run: Path, scenes: Path) -> None:
    with pytest.raises(ConfigError, match=r"`min_confidence` is 0\.5; scores need a prediction"):
        evaluate_run(run, scenes, "val", device="cpu", config=PredictConfig(min_confidence=0.5))


def test_a_minimum_score_of_regions_changes_the_prediction(
    invoke: Invoke, scenes: Path, tmp_path: Path
) -> None:
    weights = save_region_weights(tmp_path / "regions.safetensors", SCENE_CLASSES)
    plain, filtered = (
        json.loads(invoke("evaluate", weights, scenes, "--json", "--device=cpu", *extra).stdout)
        for extra in ((), ("--min-region-score=1",))
    )
    assert plain["mean_iou"] != filtered["mean_iou"]
