"""The data of a training run: its splits, the checks before training, and file fingerprints.

Entry points: `find_training_splits`, `prepare_data`, `training_dataset`, `write_fingerprints`,
`check_files_are_unchanged`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dcnseg.config import Preprocessing, TrainConfig
from dcnseg.data.check.findings import WARNING, by_severity, format_findings, raise_errors
from dcnseg.data.check.report import CheckReport, check_data
from dcnseg.data.class_map import ClassMap
from dcnseg.data.dataset import SegmentationDataset
from dcnseg.data.pairing.folders import find_pairs
from dcnseg.data.pairing.splits import SPLIT_NAMES, Pairing, Splits
from dcnseg.data.sample import Sample
from dcnseg.data.transforms import Augmentation, build_train_transform
from dcnseg.errors import CheckpointError, DataError, short_repr
from dcnseg.files import atomic_path, explain_unreadable, read_json
from dcnseg.safe_load import summarize_error

FILES: Final = "files.json"
PROBE_BYTES: Final = 4096  # read at both ends of a file; a PNG ends with a checksum of its pixels
_SHOWN_WARNINGS: Final = 3  # of each kind; `dcnseg check` lists all

Fingerprint = list[int]  # size in bytes, checksum of both ends


@dataclass(frozen=True)
class TrainingData:
    """The images of each split, the classes, and the training pixels of each class, [K]."""

    class_map: ClassMap
    splits: Splits
    pixel_counts: Tensor


def find_training_splits(config: TrainConfig) -> Splits:
    """Pair the images with their masks without opening the files.

    Raises:
        DataError: images and masks do not match, or there are too few to train on.
    """
    pairing = find_pairs(
        config.data.root,
        config.data.source,
        val_fraction=config.data.val_fraction,
        seed=config.seed,
    )
    splits = pairing.splits
    if not pairing.is_whole or len(splits.train) < 2 or not splits.val:
        raise_errors(_check(config, pairing).findings)  # together with all other errors
    return splits


def prepare_data(
    config: TrainConfig,
    splits: Splits,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> TrainingData:
    """Check every image and mask, and find the classes.

    `on_progress` is called with the number of checked pairs and the total, `on_warning` with each
    problem that does not prevent training.

    Raises:
        DataError: files are invalid; the message names all of them.
    """
    report = _check(config, Pairing(splits), on_progress)
    raise_errors(report.findings)
    if on_warning:
        for line in format_findings(by_severity(report.findings, WARNING), _SHOWN_WARNINGS):
            on_warning(line)
    assert report.class_map is not None  # a missing class map is an error above
    return TrainingData(report.class_map, splits, torch.tensor(report.train_pixels))


def _check(
    config: TrainConfig, pairing: Pairing, on_progress: Callable[[int, int], None] | None = None
) -> CheckReport:
    data = config.data
    return check_data(
        data.root,
        pairing,
        ignore=data.ignore_index,
        mask_threshold=data.mask_threshold,
        on_progress=on_progress,
    )


def training_dataset(
    config: TrainConfig,
    data: TrainingData,
    preprocessing: Preprocessing,
    augment: Augmentation | None = None,
) -> SegmentationDataset:
    """Build the dataset of augmented, normalized training crops."""
    settings = config.data
    height, width = settings.crop_size
    low, high = settings.scale_range
    transform = build_train_transform(
        crop_hw=(height, width),
        scale_range=(low, high),
        flip=settings.flip,
        vertical_flip=settings.vertical_flip,
        rotate=settings.rotate,
        color_jitter=settings.color_jitter,
        blur=settings.blur,
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
        cache=settings.cache,
    )


def write_fingerprints(run: Path, splits: Splits) -> None:
    """Write the size and checksum of the run's images and masks to files.json."""
    with atomic_path(run / FILES) as temporary:
        temporary.write_text(json.dumps(_fingerprints(splits)), encoding="utf-8")


def check_files_are_unchanged(run: Path, splits: Splits) -> None:
    """Compare the files of the run's splits with files.json.

    Raises:
        DataError: an image or mask has changed since the run started.
        CheckpointError: files.json is damaged.
    """
    path = run / FILES
    if not path.is_file():
        return  # written by an early version
    try:
        before = _parse(read_json(path, has_file_names=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {summarize_error(error)}") from error
    samples, now = _samples(splits), _fingerprints(splits)
    if missing := sorted(set(now) - set(before)):
        raise CheckpointError(f"{path} is damaged: it lacks {missing[0]}")
    changed = [
        (samples[key], kind, before[key][kind], fingerprint)
        for key, kinds in now.items()
        for kind, fingerprint in kinds.items()
        if before[key][kind] != fingerprint
    ]
    if changed:
        sample, kind, old, new = changed[0]
        file = sample.image if kind == "image" else sample.mask
        how = (
            f"{old[0]} bytes before, {new[0]} now"
            if old[0] != new[0]
            else "same size, different content"
        )
        rest = len(changed) - 1
        others = f", as have {rest} other files. Restore them" if rest else ". Restore it"
        raise DataError(
            f"{file}: has changed since the run started ({how}){others}, or start a new run."
        )


def _parse(content: Any) -> dict[str, dict[str, Fingerprint]]:
    """Validate the content of files.json; raise a ValueError if it is invalid."""
    if not isinstance(content, dict):
        raise ValueError(f"it is {short_repr(content)}; expected a JSON object")
    for name, entry in content.items():
        kinds = entry if isinstance(entry, dict) else {}
        for kind in ("image", "mask"):
            numbers = kinds.get(kind)
            if not _is_fingerprint(numbers):
                raise ValueError(
                    f"the {kind} of {short_repr(name)} is {short_repr(numbers)}; expected its "
                    "size and checksum"
                )
    return content


def _is_fingerprint(numbers: Any) -> bool:
    is_pair = isinstance(numbers, list) and len(numbers) == 2
    return is_pair and all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _samples(splits: Splits) -> dict[str, Sample]:
    return {
        f"{name}/{sample.stem}": sample for name in SPLIT_NAMES for sample in getattr(splits, name)
    }


def _fingerprints(splits: Splits) -> dict[str, dict[str, Fingerprint]]:
    samples = _samples(splits)
    with ThreadPoolExecutor() as pool:
        images = pool.map(_fingerprint, [sample.image for sample in samples.values()])
        masks = pool.map(_fingerprint, [sample.mask for sample in samples.values()])
        return {
            key: {"image": image, "mask": mask}
            for key, image, mask in zip(samples, images, masks, strict=True)
        }


def _fingerprint(path: Path) -> Fingerprint:
    with explain_unreadable(path, "a readable file"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        checksum = zlib.crc32(file.read(PROBE_BYTES))
        file.seek(max(0, size - PROBE_BYTES))
        return [size, zlib.crc32(file.read(), checksum)]
