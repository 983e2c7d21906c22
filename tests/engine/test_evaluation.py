from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcnseg.checkpoint import BEST_WEIGHTS, load_segmenter
from dcnseg.config import PairSource
from dcnseg.data.dataset import load_label_map
from dcnseg.data.image_io import read_image
from dcnseg.data.pairing.folders import find_splits
from dcnseg.engine.evaluation import Scores, count_confusion, evaluate_run
from dcnseg.engine.run_folder import read_run
from dcnseg.engine.training import train
from dcnseg.errors import ConfigError, DataError
from dcnseg.inference.predictor import Predictor
from tests.conftest import small_config


def test_scores_by_hand() -> None:
    labels = np.array([[0, 0, 1, 1, 255]], np.uint8)
    predicted = np.array([[0, 1, 1, 1, 2]], np.uint8)
    scores = Scores(count_confusion(labels, predicted, 4), ("a", "b", "c", "d"))
    assert scores.confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0] * 4, [0] * 4]
    assert scores.class_iou[:2].tolist() == [1 / 2, 2 / 3]
    assert np.isnan(scores.class_iou[2:]).all()  # absent classes are not perfect classes
    assert scores.mean_iou == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores.pixel_accuracy == 3 / 4
    assert scores.to_dict()["class_iou"]["c"] is None


def test_a_class_only_predicted_counts_as_zero() -> None:
    labels, predicted = np.array([[0, 0]], np.uint8), np.array([[0, 1]], np.uint8)
    assert Scores(count_confusion(labels, predicted, 2), ("a", "b")).mean_iou == 0.25


def test_nothing_labeled_has_no_score() -> None:
    scores = Scores(np.zeros((2, 2), np.int64), ("a", "b"))
    assert scores.to_dict()["mean_iou"] is None
    assert scores.to_dict()["pixel_accuracy"] is None


def test_split_scores_are_those_of_the_predictions(run: Path, scenes: Path) -> None:
    predictor = Predictor.from_checkpoint(run, device="cpu")
    hits = total = 0
    for sample in find_splits(scenes).test:
        labels = load_label_map(sample, predictor.class_map)
        hits += int((predictor.predict(read_image(sample.image)).labels == labels).sum())
        total += labels.size
    seen: list[tuple[int, int]] = []
    scores = evaluate_run(
        run, scenes, "test", device="cpu", on_progress=lambda *done: seen.append(done)
    )
    assert scores.pixel_accuracy == pytest.approx(hits / total)
    assert seen == [(1, 2), (2, 2)]


def test_missing_split_is_named(run: Path, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--split is 'dev'; expected one of train, val, test"):
        evaluate_run(run, scenes, "dev")
    without_test = tmp_path / "scenes"
    shutil.copytree(scenes, without_test, ignore=shutil.ignore_patterns("test"))
    with pytest.raises(ConfigError, match="does not contain this split; it contains train, val"):
        evaluate_run(run, without_test, "test")


def test_other_classes_are_refused(run: Path, data_copy: Path) -> None:
    classes = json.loads((data_copy / "classes.json").read_text())
    before = classes["classes"][1]["name"]
    classes["classes"][1]["name"] = "zebra"
    (data_copy / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(DataError, match=f"class 1 is 'zebra', but the run has '{before}'"):
        evaluate_run(run, data_copy, "val")


def test_the_runs_own_split_is_used_for_its_images(scenes: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "flat", tmp_path / "run"
    for kind in ("images", "masks"):
        shutil.copytree(scenes / "train" / kind, data / kind)
    shutil.copy(scenes / "classes.json", data)
    config = small_config(data, epochs=1, seed=5)
    train(replace(config, data=replace(config.data, val_fraction=0.5)), run)
    moved = shutil.copytree(data, tmp_path / "moved")
    expected = evaluate_run(run, data, "val", device="cpu").confusion
    assert expected.sum() > 0
    for i in range(20):  # added later
        for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
            shutil.copy(data / kind / f"scene_0000{suffix}", data / kind / f"added_{i}{suffix}")
    for weights, root in ((run, moved), (run, data), (run / BEST_WEIGHTS, data)):
        confusion = evaluate_run(weights, root, "val", device="cpu").confusion
        np.testing.assert_array_equal(confusion, expected)


def test_a_foreign_config_beside_a_weights_file_is_left_alone(
    run: Path, scenes: Path, tmp_path: Path
) -> None:
    shutil.copy(run / BEST_WEIGHTS, tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    scores = evaluate_run(tmp_path / BEST_WEIGHTS, scenes, "val", device="cpu")
    assert scores.confusion.sum() == 3 * 64 * 96


def test_the_scores_of_training_are_those_of_evaluate(run: Path, scenes: Path) -> None:
    _, info = load_segmenter(run / BEST_WEIGHTS)
    assert evaluate_run(run, scenes, "val", device="cpu").to_dict().items() <= info.scores.items()


def test_a_mask_of_another_size_is_named(run: Path, data_copy: Path) -> None:
    path = sorted((data_copy / "val" / "masks").iterdir())[0]
    with Image.open(path) as mask:
        mask.resize((90, 60)).save(path)
    with pytest.raises(DataError, match=rf"{path.name}: is 90x60 pixels.*96x64"):
        evaluate_run(run, data_copy, "val", device="cpu")


def test_a_run_remembers_how_its_images_are_paired(scenes: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "odd", tmp_path / "run"
    shutil.copytree(scenes / "train" / "images", data / "a")
    shutil.copytree(scenes / "train" / "masks", data / "b")
    shutil.copy(scenes / "classes.json", data)
    config = small_config(data, epochs=1, seed=4)
    place = replace(config.data, images="a/{stem}.jpg", masks="b/{stem}.png", val_fraction=0.4)
    train(replace(config, data=place), run)
    own = evaluate_run(run, data, "val", device="cpu")
    lines = [f"a/{stem}.jpg,b/{stem}.png,val" for stem in read_run(run).split["val"]]
    (data / "val.csv").write_text("\n".join(lines))
    source = PairSource(pairs=data / "val.csv")
    listed = evaluate_run(run, data, "all", device="cpu", source=source)
    assert len(lines) == 3
    assert own.confusion.sum() == 3 * 64 * 96
    np.testing.assert_array_equal(own.confusion, listed.confusion)
