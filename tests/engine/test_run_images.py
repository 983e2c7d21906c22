from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcnseg.config import Preprocessing
from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import SegmentationDataset
from dcnseg.data.image_io import read_image
from dcnseg.data.pairing.folders import find_splits
from dcnseg.engine import run_images
from dcnseg.engine.run_images import write_preview, write_train_batch, write_worst
from dcnseg.inference.predictor import Predictor
from dcnseg.scoring.scores import ImageScores, Scores
from dcnseg.visualize.previews import draw_preview, draw_training_batch


def make_scores(ious: list[float], num_classes: int) -> Scores:
    """Scores of images with the given IoU of class 0; NaN: nothing is labeled."""
    images = []
    for i, iou in enumerate(ious):
        counts = np.zeros((num_classes, 3), np.int64)
        if not np.isnan(iou):
            counts[0] = (1000 * iou, 1000, 1000 * iou)
        images.append(ImageScores(f"image {i}", counts))
    return Scores(np.eye(num_classes, dtype=np.int64), ("a",) * num_classes, tuple(images))


@pytest.mark.parametrize(
    ("write", "ious", "expected"),
    [
        (write_preview, [0.4, 0.9, 0.1, 0.5, 0.6], ["Best: 1", "Median: 3", "Worst: 2"]),
        (write_preview, [0.4, np.nan, 0.1], ["Best: 0", "Worst: 2"]),
        (write_preview, [0.4], ["Best: 0"]),
        (write_preview, [np.nan], []),
        (write_worst, [0.4, np.nan, 0.1], ["Worst 1: 2", "Worst 2: 0"]),
    ],
)
def test_images_are_chosen_by_their_score(
    predictor: Predictor,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Any,
    ious: list[float],
    expected: list[str],
) -> None:
    splits = find_splits(scenes)
    samples = (splits.train + splits.val)[: len(ious)]
    titles: list[str] = []

    def record(rows: Any, *arguments: Any) -> Any:
        titles.extend(row.title for row in rows)
        return draw_preview(rows, *arguments)

    monkeypatch.setattr(run_images, "draw_preview", record)
    write(tmp_path / "a.jpg", predictor, samples, make_scores(ious, 4))
    numbers = {sample.stem: str(i) for i, sample in enumerate(samples)}
    found = [(name, numbers[rest.split(",")[0]]) for name, rest in (t.split(": ") for t in titles)]
    assert [f"{name}: {number}" for name, number in found] == expected
    assert read_image(tmp_path / "a.jpg").shape[1] > 1600


def test_a_training_batch_is_drawn_without_normalization(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessing = Preprocessing()
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    dataset = SegmentationDataset(
        find_splits(scenes).train,
        ClassMap.from_file(scenes / "classes.json"),
        lambda image, labels: ((image / 255 - mean) / std, labels.long()),
    )
    shown: list[Any] = []

    def record(images: Any, *arguments: Any) -> Any:
        shown.extend(images)
        return draw_training_batch(images, *arguments)

    monkeypatch.setattr(run_images, "draw_training_batch", record)
    state = torch.random.get_rng_state()
    write_train_batch(tmp_path / "a.jpg", dataset, [3, 1], preprocessing)
    assert torch.equal(state, torch.random.get_rng_state())
    for image, index in zip(shown, (3, 1), strict=True):
        np.testing.assert_array_equal(image, read_image(dataset.samples[index].image))
