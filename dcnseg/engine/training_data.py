"""What a training run learns from, looked at before it begins.

Entry points: `find_training_splits`, then `prepare_data`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dcnseg.config import Preprocessing, TrainConfig
from dcnseg.data.check import inspect_samples
from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import SegmentationDataset, load_class_map
from dcnseg.data.folders import Splits, find_splits
from dcnseg.data.transforms import build_train_transform
from dcnseg.errors import DataError


@dataclass(frozen=True)
class TrainingData:
    """The pictures of each split, their classes, and the training pixels of each class, [K]."""

    class_map: ClassMap
    splits: Splits
    pixel_counts: Tensor


def find_training_splits(config: TrainConfig) -> Splits:
    """Pair the pictures with their masks, without opening them.

    Raises:
        DataError: pictures and masks do not pair up, or there is too little to train on.
    """
    root = config.data.root
    splits = find_splits(root, val_fraction=config.data.val_fraction, seed=config.seed)
    if len(splits.train) < 2 or not splits.val:
        raise DataError(
            f"{root}: {len(splits.train)} pictures to train on and {len(splits.val)} to validate "
            "with; expected at least 2 and 1."
        )
    return splits


def prepare_data(
    config: TrainConfig,
    splits: Splits,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainingData:
    """Find the classes, and look at every mask.

    Args:
        config: All settings.
        splits: From `find_training_splits`.
        on_progress: Called with the masks looked at and their number.

    Raises:
        DataError: a file is wrong; the message names it.
    """
    class_map = load_class_map(config.data.root, splits, config.data.ignore_index)
    num_samples = len(splits.all_samples())
    done_before = 0

    def report(done: int, _: int) -> None:
        if on_progress:
            on_progress(done_before + done, num_samples)

    # One by one: train and val need labelled pixels each. Test masks are often dummies.
    summary = inspect_samples(splits.train, class_map, on_progress=report)
    done_before += len(splits.train)
    inspect_samples(splits.val, class_map, on_progress=report)
    done_before += len(splits.val)
    if splits.test:
        inspect_samples(splits.test, class_map, on_progress=report, may_be_void=True)
    return TrainingData(class_map, splits, torch.tensor(summary.pixel_counts))


def training_dataset(
    config: TrainConfig, data: TrainingData, preprocessing: Preprocessing
) -> SegmentationDataset:
    """The training pictures as randomly varied, normalised crops."""
    height, width = config.data.crop_size
    low, high = config.data.scale_range
    transform = build_train_transform(
        crop_hw=(height, width),
        scale_range=(low, high),
        flip=config.data.flip,
        colour_jitter=config.data.colour_jitter,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return SegmentationDataset(
        data.splits.train,
        data.class_map,
        transform,
        input_scale=preprocessing.input_scale,
        seed=config.seed,
        cache=config.data.cache,
    )
