"""Images of a run folder; entry points `write_preview`, `write_worst` and `write_train_batch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from dcnseg.config import Preprocessing
from dcnseg.data.dataset import SegmentationDataset, load_pair
from dcnseg.data.image_io import write_jpeg
from dcnseg.data.sample import Sample
from dcnseg.inference.predictor import Predictor
from dcnseg.scoring.counts import LABELED
from dcnseg.scoring.scores import Scores
from dcnseg.visualize.previews import PredictedSample, draw_preview, draw_training_batch

SHOWN_CROPS: Final = 8
WORST_IMAGES: Final = 6


def write_preview(
    path: Path, predictor: Predictor, samples: Sequence[Sample], scores: Scores
) -> None:
    """Draw the best, the median and the worst of the evaluated images that have a score."""
    order = _from_worst_to_best(scores)
    ranks = (("Worst", order), ("Median", order[len(order) // 2 :]), ("Best", order[-1:]))
    shown = {indices[0]: name for name, indices in ranks if indices}  # each image once
    _write_rows(path, predictor, samples, scores, dict(reversed(shown.items())))


def write_worst(
    path: Path, predictor: Predictor, samples: Sequence[Sample], scores: Scores
) -> None:
    """Draw the worst of the evaluated images."""
    worst = _from_worst_to_best(scores)[:WORST_IMAGES]
    titles = {index: f"Worst {rank}" for rank, index in enumerate(worst, 1)}
    _write_rows(path, predictor, samples, scores, titles)


def _from_worst_to_best(scores: Scores) -> list[int]:
    """The indices of the images that have a score."""
    ious = np.array([image.mean_iou for image in scores.images])
    order: list[int] = np.argsort(ious, kind="stable").tolist()  # NaN last
    return order[: np.count_nonzero(~np.isnan(ious))]


def _write_rows(
    path: Path,
    predictor: Predictor,
    samples: Sequence[Sample],
    scores: Scores,
    titles: Mapping[int, str],
) -> None:
    rows = []
    for index, name in titles.items():
        image, labels = load_pair(samples[index], predictor.class_map)
        title = f"{name}: {samples[index].stem}, mIoU {scores.images[index].mean_iou:.3f}"
        rows.append(PredictedSample(title, image, labels, predictor.predict(image).labels))
    write_jpeg(path, draw_preview(rows, predictor.class_map, scores.counts[:, LABELED]))


def write_train_batch(
    path: Path,
    dataset: SegmentationDataset,
    indices: Sequence[int],
    preprocessing: Preprocessing,
) -> None:
    """Draw training crops with their masks, as the network sees them but without normalization.

    The random numbers of the training are not affected.
    """
    crops = [dataset[index] for index in indices[:SHOWN_CROPS]]
    mean, std = (torch.tensor(values) for values in (preprocessing.mean, preprocessing.std))
    images = [
        (255 * (crop.permute(1, 2, 0) * std + mean)).round().clamp(0, 255).byte().numpy()
        for crop, _ in crops
    ]
    labels = [label_map.byte().numpy() for _, label_map in crops]
    write_jpeg(path, draw_training_batch(images, labels, dataset.class_map))
