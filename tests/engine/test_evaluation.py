from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dcnseg.checkpoint import BEST_WEIGHTS, load_segmenter
from dcnseg.config import PairSource
from dcnseg.data.dataset import load_label_map
from dcnseg.data.image_io import read_image
from dcnseg.data.pairing.folders import find_splits
from dcnseg.engine import trainer
from dcnseg.engine.evaluation import Scores, count_confusion, evaluate, evaluate_run
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.run_folder import read_metrics, read_run
from dcnseg.engine.training import train
from dcnseg.errors import ConfigError, DataError, NotFiniteError, TrainingError
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
    with pytest.raises(ConfigError, match="no such images; it has train, val"):
        evaluate_run(run, without_test, "test")


def test_other_classes_are_refused(run: Path, scenes: Path, tmp_path: Path) -> None:
    other = tmp_path / "scenes"
    shutil.copytree(scenes, other)
    classes = json.loads((other / "classes.json").read_text())
    before = classes["classes"][1]["name"]
    classes["classes"][1]["name"] = "zebra"
    (other / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(DataError, match=f"calls the id 1 'zebra'; the run was .* '{before}'"):
        evaluate_run(run, other, "val")


def test_a_weights_file_in_a_run_means_the_runs_own_split(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "flat"
    for kind in ("images", "masks"):
        shutil.copytree(scenes / "train" / kind, data / kind)
    shutil.copy(scenes / "classes.json", data)
    config = small_config(data, epochs=1, seed=5)
    config = replace(config, data=replace(config.data, val_fraction=0.5))
    train(config, tmp_path / "run")
    by_folder, by_file = (
        evaluate_run(run, data, "val", device="cpu").confusion
        for run in (tmp_path / "run", tmp_path / "run" / BEST_WEIGHTS)
    )
    assert by_folder.sum() > 0
    np.testing.assert_array_equal(by_folder, by_file)


def test_images_added_later_do_not_move_the_split(scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "flat"
    for kind in ("images", "masks"):
        shutil.copytree(scenes / "train" / kind, data / kind)
    shutil.copy(scenes / "classes.json", data)
    train(small_config(data, epochs=1), tmp_path / "run")
    before = evaluate_run(tmp_path / "run", data, "val", device="cpu").confusion
    for i in range(20):
        for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
            shutil.copy(data / kind / f"scene_0000{suffix}", data / kind / f"added_{i}{suffix}")
    after = evaluate_run(tmp_path / "run", data, "val", device="cpu").confusion
    np.testing.assert_array_equal(before, after)


def test_a_run_knows_its_images_in_a_moved_folder(scenes: Path, tmp_path: Path) -> None:
    data, moved = tmp_path / "flat", tmp_path / "moved"
    for kind in ("images", "masks"):
        shutil.copytree(scenes / "train" / kind, data / kind)
    shutil.copy(scenes / "classes.json", data)
    config = small_config(data, epochs=1, seed=3)
    config = replace(config, data=replace(config.data, val_fraction=0.5))
    train(config, tmp_path / "run")
    before = evaluate_run(tmp_path / "run", data, "val", device="cpu").confusion
    data.rename(moved)
    after = evaluate_run(tmp_path / "run", moved, "val", device="cpu").confusion
    np.testing.assert_array_equal(before, after)


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


def test_a_mask_of_another_size_is_named(run: Path, scenes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    path = sorted((data / "val" / "masks").iterdir())[0]
    with Image.open(path) as mask:
        mask.resize((90, 60)).save(path)
    with pytest.raises(DataError, match=rf"{path.name}: is 90x60 pixels.*96x64"):
        evaluate_run(run, data, "val", device="cpu")


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


class Warnings(TrainingListener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warned(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("bad_epochs", [(1,), (1, 2)])
def test_an_epoch_whose_output_is_not_finite_has_no_score(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_epochs: tuple[int, ...]
) -> None:
    """Its weights never become the best, training goes on, and without any score it says why."""
    epochs = iter([1, 2])

    def evaluate_some(*arguments: Any, **options: Any) -> Scores:
        if next(epochs) in bad_epochs:
            raise NotFiniteError("a.png: not finite")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(trainer, "evaluate", evaluate_some)
    listener = Warnings()
    if len(bad_epochs) == 2:
        with pytest.raises(TrainingError, match=r"No epoch of .* has a score: the network's outp"):
            train(small_config(scenes), tmp_path, listener=listener)
        assert not (tmp_path / BEST_WEIGHTS).exists()
    else:
        assert train(small_config(scenes), tmp_path, listener=listener).best_epoch == 2
    assert [line["mean_iou"] is None for line in read_metrics(tmp_path)] == [
        epoch in bad_epochs for epoch in (1, 2)
    ]
    assert "Epoch 1 has no score. a.png: not finite" in listener.texts
