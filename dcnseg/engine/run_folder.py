"""The run folder of a training run.

config.json       every setting and its source, versions, the split
classes.json      names, ids and colors of the classes
files.json        size and checksum of every image and mask
metrics.jsonl     one line per epoch
best.safetensors  the weights with the best validation score
last.ckpt         the checkpoint to resume from
scores.json       the validation scores of the best weights, with the confusion matrix
preview.jpg       the best, median and worst validation images with masks, predictions and errors
train_batch.jpg   the first augmented training images with their masks

`dcnseg train` and `dcnseg.train` add charts and a report: results.png, confusion_matrix.png,
labels.png and report.html.

Entry points: `create_run`, `read_run`, `update_settings`.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torchvision

from dcnseg import __version__
from dcnseg.checkpoint import BEST_WEIGHTS, RESUME_STATE
from dcnseg.config import TrainConfig, from_dict, to_dict, with_absolute_paths
from dcnseg.data.class_map import ClassMap
from dcnseg.data.pairing.splits import SPLIT_NAMES, Splits
from dcnseg.engine.training_data import FILES, write_fingerprints
from dcnseg.errors import CheckpointError, ConfigError, DataError, short_repr
from dcnseg.files import atomic_path, mark_output_folder, read_json
from dcnseg.processes import this_process
from dcnseg.safe_load import summarize_error
from dcnseg.validation import require

CONFIG = "config.json"
CLASSES = "classes.json"
METRICS = "metrics.jsonl"
SCORES = "scores.json"
PREVIEW = "preview.jpg"
TRAIN_BATCH = "train_batch.jpg"
CURVES_CHART = "results.png"
CONFUSION_CHART = "confusion_matrix.png"
LABELS_CHART = "labels.png"
REPORT = "report.html"
RUN_FILES = (
    *(CONFIG, CLASSES, FILES, METRICS, SCORES, PREVIEW, TRAIN_BATCH, BEST_WEIGHTS, RESUME_STATE),
    *(CURVES_CHART, CONFUSION_CHART, LABELS_CHART, REPORT),
)


@dataclass(frozen=True)
class RunRecord:
    """The contents of config.json and classes.json; early versions lack command and versions.

    `job` is that of `Process`: the job of torchrun that started the run.
    """

    config: TrainConfig
    sources: Mapping[str, str]
    split: Mapping[str, Sequence[str]]
    class_map: ClassMap
    command: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    job: str = ""


def create_run(
    run: Path, config: TrainConfig, sources: Mapping[str, str], class_map: ClassMap, splits: Splits
) -> None:
    """Write the settings of a new run to its folder; the files of a previous run are deleted.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    for name in RUN_FILES:
        (run / name).unlink(missing_ok=True)
    remove_temporary_files(run)
    with explain_write_errors(run):
        mark_output_folder(run)
    record = {
        "dcnseg": __version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        **({"job": job} if (job := this_process().job) else {}),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "segmentation-models-pytorch": smp.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
        "settings": to_dict(with_absolute_paths(config)),
        "sources": dict(sources),
        "split": split_stems(splits),
    }
    _write_json(run / CLASSES, class_map.to_dict())
    with explain_write_errors(run / FILES):
        write_fingerprints(run, splits)
    _write_json(run / CONFIG, record)  # last: a folder with it is a run


def update_settings(run: Path, config: TrainConfig, changed: Sequence[str]) -> None:
    """Write the settings changed by a resume, for the next resume."""
    record = read_json(run / CONFIG, has_file_names=True)
    record["settings"] = to_dict(with_absolute_paths(config))
    record["sources"] |= dict.fromkeys(changed, "command line, at resume")
    _write_json(run / CONFIG, record)


def is_run(folder: Path) -> bool:
    """Whether the folder has a config.json of dcnseg; other programs use that name, too."""
    try:
        record = read_json(folder / CONFIG, has_file_names=True)
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"dcnseg", "settings"} <= set(record)


def write_scores(run: Path, scores: Mapping[str, Any]) -> None:
    """Write the scores of the best weights."""
    _write_json(run / SCORES, scores)


def read_scores(run: Path) -> dict[str, Any]:
    """Read the scores of the best weights; empty if there are none, as in early versions.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = run / SCORES
    if not path.is_file():
        return {}
    num_classes = len(read_run(run).class_map.names)
    try:
        scores: dict[str, Any] = read_json(path)
        require(isinstance(scores, dict), f"it is {short_repr(scores)}; expected a JSON object.")
        confusion = np.asarray(scores.get("confusion"), np.int64)
        pixels = np.asarray(scores.get("train_pixels"), np.int64)
        shapes = confusion.shape, pixels.shape
        require(shapes == ((num_classes,) * 2, (num_classes,)), "its counts have a wrong shape.")
        kinds = ("class_iou", "class_precision", "class_recall", "class_f1")
        missing = {"epoch", "mean_iou", "pixel_accuracy", *kinds} - set(scores)
        require(not missing, f"it lacks {', '.join(sorted(missing))}.")
    except (OSError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {summarize_error(error)}") from error
    return scores


def read_run(run: Path) -> RunRecord:
    """Read the settings of a run.

    Raises:
        CheckpointError: the folder is not a run folder, or its files are damaged.
    """
    path = run / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{run} has no {CONFIG}; expected a run folder of `dcnseg train`.")
    try:
        class_map = ClassMap.from_dict(read_json(run / CLASSES))
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{run / CLASSES} is damaged: {summarize_error(error)}") from error
    try:
        record = read_json(path, has_file_names=True)
        require(isinstance(record, dict), f"it is {short_repr(record)}; expected a JSON object.")
        config = from_dict(TrainConfig, record.get("settings"))
        sources, split = record.get("sources"), record.get("split")
        require(is_table(sources, str), f"sources is {short_repr(sources)}; expected strings.")
        require(
            is_table(split, list) and set(split) == set(SPLIT_NAMES),
            f"split is {short_repr(split)}; expected lists for {', '.join(SPLIT_NAMES)}.",
        )
        for name, stems in split.items():
            wrong = [stem for stem in stems if not isinstance(stem, str)]
            require(not wrong, f"split.{name} has {short_repr(wrong[:1])}; expected names.")
        command, versions = record.get("command", []), record.get("versions", {})
        require(isinstance(command, list), f"command is {short_repr(command)}; expected a list.")
        require(is_table(versions, str), f"versions is {short_repr(versions)}; expected strings.")
        job = record.get("job", "")
        require(isinstance(job, str), f"job is {short_repr(job)}; expected a string.")
        return RunRecord(config, sources, split, class_map, [*map(str, command)], versions, job)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {summarize_error(error)}") from error


def is_table(value: Any, kind: type) -> bool:
    """Whether a value is a dictionary whose values are all of one type."""
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


def split_stems(splits: Splits) -> dict[str, list[str]]:
    """List the stems of the images of each split."""
    return {name: [sample.stem for sample in getattr(splits, name)] for name in SPLIT_NAMES}


def check_classes_are_unchanged(record: RunRecord, class_map: ClassMap) -> None:
    """Raise a DataError if the data folder has other classes than the run."""
    if class_map != record.class_map:
        raise DataError(
            f"{record.config.data.root}: the classes have changed since the run started: "
            f"{', '.join(record.class_map.names)} then, {', '.join(class_map.names)} now. "
            "Restore the class list, or start a new run."
        )


def check_split_is_unchanged(record: RunRecord, splits: Splits) -> None:
    """Raise a DataError if the data folder has another split than the run."""
    now = split_stems(splits)
    for name, before in record.split.items():
        gone = sorted(set(before) - set(now[name]))
        new = sorted(set(now[name]) - set(before))
        if gone or new:
            change = f"{len(gone)} missing ({gone[0]})" if gone else f"{len(new)} new ({new[0]})"
            raise DataError(
                f"{record.config.data.root}: the {name} images have changed since the run "
                f"started: {change}. Restore them, or start a new run."
            )


def remove_temporary_files(run: Path) -> None:
    """Delete files that a killed process did not finish writing."""
    for path in run.glob(".*.tmp.*"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp\.[a-z]+", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Replace an OSError by a CheckpointError that names the file.

    Raises:
        CheckpointError: writing failed.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. Its previous content is intact. "
            "Free disk space or fix the permissions, then resume the run."
        ) from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with explain_write_errors(path), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
