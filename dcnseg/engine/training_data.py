"""What a training run learns from, looked at before it begins.

Entry points: `find_training_splits`, then `prepare_data`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dcnseg.config import Preprocessing, TrainConfig
from dcnseg.data.check.findings import WARNING, by_severity, raise_errors, shortened
from dcnseg.data.check.report import CheckReport, check_data
from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import SegmentationDataset
from dcnseg.data.pairing.folders import find_pairs
from dcnseg.data.pairing.splits import Pairing, Splits
from dcnseg.data.transforms import Augmentation, build_train_transform

_SHOWN_WARNINGS: Final = 3  # of each kind; `dcnseg check` lists more


@dataclass(frozen=True)
class TrainingData:
    """The images of each split, their classes, and the training pixels of each class, [K]."""

    class_map: ClassMap
    splits: Splits
    pixel_counts: Tensor


def find_training_splits(config: TrainConfig) -> Splits:
    """Pair the images with their masks, without opening them.

    Raises:
        DataError: images and masks do not pair up, or there is too little to train on.
    """
    pairing = find_pairs(
        config.data.root,
        config.data.source,
        val_fraction=config.data.val_fraction,
        seed=config.seed,
    )
    splits = pairing.splits
    if not pairing.is_whole or len(splits.train) < 2 or not splits.val:
        raise_errors(_check(config, pairing).findings)  # with all else that is wrong
    return splits


def prepare_data(
    config: TrainConfig,
    splits: Splits,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> TrainingData:
    """Look at every image and mask, and find the classes.

    Args:
        config: All settings.
        splits: From `find_training_splits`.
        on_progress: Called with the pairs looked at and their number.
        on_warning: Called with each thing that looks wrong but does not stop training.

    Raises:
        DataError: files are wrong; the message names all of them.
    """
    report = _check(config, Pairing(splits), on_progress)
    raise_errors(report.findings)
    if on_warning:
        for line in shortened(by_severity(report.findings, WARNING), _SHOWN_WARNINGS):
            on_warning(line)
    assert report.class_map is not None  # else there was an error
    return TrainingData(report.class_map, splits, torch.tensor(report.train_pixels))


def _check(
    config: TrainConfig,
    pairing: Pairing,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    return check_data(
        config.data.root,
        pairing,
        ignore=config.data.ignore_index,
        mask_threshold=config.data.mask_threshold,
        on_progress=on_progress,
    )


def training_dataset(
    config: TrainConfig,
    data: TrainingData,
    preprocessing: Preprocessing,
    augment: Augmentation | None = None,
) -> SegmentationDataset:
    """The training images as randomly varied, normalized crops."""
    height, width = config.data.crop_size
    low, high = config.data.scale_range
    transform = build_train_transform(
        crop_hw=(height, width),
        scale_range=(low, high),
        flip=config.data.flip,
        vertical_flip=config.data.vertical_flip,
        rotate=config.data.rotate,
        color_jitter=config.data.color_jitter,
        blur=config.data.blur,
        augment=augment,
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
