from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dcnseg.checkpoint import BEST_WEIGHTS
from dcnseg.config import PairSource
from dcnseg.data.dataset import load_label_map
from dcnseg.data.image_io import read_image
from dcnseg.data.pairing.folders import find_splits
from dcnseg.engine.evaluation import evaluate_run, find_masks
from dcnseg.engine.run_folder import read_run
from dcnseg.engine.training import train
from dcnseg.errors import ConfigError, DataError
from dcnseg.inference.inputs import find_inputs
from dcnseg.inference.predictor import Predictor
from dcnseg.scoring.counts import count_confusion
from dcnseg.scoring.scores import Scores
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


def test_missing_split_is_named(run: Path, data_copy: Path) -> None:
    with pytest.raises(ConfigError, match="--split is 'dev'; expected one of train, val, test"):
        evaluate_run(run, data_copy, "dev")
    shutil.rmtree(data_copy / "test")
    with pytest.raises(ConfigError, match="does not contain this split; it contains train, val"):
        evaluate_run(run, data_copy, "test")


def test_masks_of_the_own_and_of_other_data_folders(
    run: Path, scenes: Path, data_copy: Path, tmp_path: Path
) -> None:
    own = find_inputs([str(scenes / "test" / "images")])
    found = find_masks(run, own, [])
    assert [found[os.path.realpath(image.path)].mask for image in own] == [
        scenes / "test" / "masks" / f"{image.path.stem}.png" for image in own
    ]
    elsewhere = shutil.copytree(data_copy, tmp_path / "elsewhere")
    (link := tmp_path / "link").symlink_to(elsewhere)
    images = find_inputs([str(link)])
    weights = tmp_path / "w.safetensors"
    shutil.copy(run / BEST_WEIGHTS, weights)
    for network in (run, weights):
        assert not find_masks(network, images, [])
        assert not find_masks(network, images, [str(elsewhere / "test" / "images"), "-", "x" * 300])
        found = find_masks(network, images, [str(link)])
        assert found.keys() == {os.path.realpath(image.path) for image in images}
    classes = json.loads((elsewhere / "classes.json").read_text())
    classes["classes"][1]["name"] = "ruby"
    (elsewhere / "classes.json").write_text(json.dumps(classes))
    assert not find_masks(run, images, [str(link)])


def test_other_classes_are_refused(run: Path, data_copy: Path) -> None:
    classes = json.loads((data_copy / "classes.json").read_text())
    before = classes["classes"][1]["name"]
    classes["classes"][1]["name"] = "zebra"
    (data_copy / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(DataError, match=f"class 1 is 'zebra', but the run has '{before}'"):
        evaluate_run(run, data_copy, "val")


def test_a_run_remembers_its_split_and_how_its_images_are_paired(
    scenes: Path, tmp_path: Path
) -> None:
    flat, run = tmp_path / "flat", tmp_path / "run"
    shutil.copytree(scenes / "train" / "images", flat / "a")
    shutil.copytree(scenes / "train" / "masks", flat / "b")
    shutil.copy(scenes / "classes.json", flat)
    config = small_config(flat, epochs=1, seed=5)
    patterns = PairSource("a/{stem}.jpg", "b/{stem}.png")
    place = {"images": patterns.images, "masks": patterns.masks, "val_fraction": 0.4}
    train(replace(config, data=replace(config.data, **place)), run)  # type: ignore[arg-type]
    moved = shutil.copytree(flat, tmp_path / "moved")
    lines = [f"a/{stem}.jpg,b/{stem}.png,val" for stem in read_run(run).split["val"]]
    (flat / "val.csv").write_text("\n".join(lines))
    source = PairSource(pairs=flat / "val.csv")
    expected = evaluate_run(run, flat, "all", device="cpu", source=source).confusion
    assert expected.sum() == 3 * 64 * 96
    for i in range(20):  # added later
        for name in ("a/{}.jpg", "b/{}.png"):
            shutil.copy(flat / name.format("scene_0000"), flat / name.format(f"added_{i}"))
    for weights, root, given in (
        (run, moved, patterns),
        (run, flat, None),
        (run / BEST_WEIGHTS, flat, None),
    ):
        confusion = evaluate_run(weights, root, "val", device="cpu", source=given).confusion
        np.testing.assert_array_equal(confusion, expected)


def test_a_foreign_config_beside_a_weights_file_is_left_alone(
    run: Path, scenes: Path, tmp_path: Path
) -> None:
    shutil.copy(run / BEST_WEIGHTS, tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    scores = evaluate_run(tmp_path / BEST_WEIGHTS, scenes, "val", device="cpu")
    assert scores.confusion.sum() == 3 * 64 * 96
