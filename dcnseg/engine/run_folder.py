"""The run folder: everything that is needed to repeat, judge and resume a training run.

config.json       every setting and where it came from, versions, the split
classes.json      names, ids and colors
files.json        size and checksum of every image and mask
metrics.jsonl     one line per epoch
best.safetensors  the weights with the best validation score
last.ckpt         the state to resume from
preview.jpg       a few validation images, their masks and the predictions of the best weights
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torchvision

from dcnseg import __version__
from dcnseg.checkpoint import BEST_WEIGHTS, RESUME_STATE
from dcnseg.config import MAX_COUNT, TrainConfig, from_dict, to_dict
from dcnseg.data.class_map import ClassMap
from dcnseg.data.pairing.splits import SPLIT_NAMES, Splits
from dcnseg.data.sample import Sample
from dcnseg.engine.fingerprint import FILES, write_fingerprints
from dcnseg.errors import CheckpointError, ConfigError, DataError, short_repr
from dcnseg.files import (
    atomic_path,
    mark_output_folder,
    open_regular_file,
    parse_json,
    read_json,
)
from dcnseg.safe_load import summarize_error
from dcnseg.validation import require, require_json_value

CONFIG = "config.json"
CLASSES = "classes.json"
METRICS = "metrics.jsonl"
PREVIEW = "preview.jpg"
_OTHER_PLACE = "Choose a folder outside of the data, such as --out runs/first."
RUN_FILES = (CONFIG, CLASSES, FILES, METRICS, PREVIEW, BEST_WEIGHTS, RESUME_STATE)


@dataclass(frozen=True)
class RunRecord:
    """What config.json and classes.json say of a run."""

    config: TrainConfig
    sources: Mapping[str, str]
    split: Mapping[str, Sequence[str]]
    class_map: ClassMap


def create_run(
    run: Path,
    config: TrainConfig,
    sources: Mapping[str, str],
    class_map: ClassMap,
    splits: Splits,
) -> None:
    """Write the settings of a new run to its folder; the files of a former run are deleted.

    Args:
        run: The folder.
        config: All settings.
        sources: Where each setting came from ("model.encoder": "command line").
        class_map: The classes.
        splits: The images of each split.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    for name in RUN_FILES:
        (run / name).unlink(missing_ok=True)
    drop_unfinished_files(run)
    with add_file_to_errors(run):
        mark_output_folder(run)
    record = {
        "dcnseg": __version__,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "segmentation-models-pytorch": smp.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
        "settings": to_dict(_with_absolute_root(config)),
        "sources": dict(sources),
        "split": split_stems(splits),
    }
    _write_json(run / CLASSES, class_map.to_dict())
    with add_file_to_errors(run / FILES):
        write_fingerprints(run, splits)
    _write_json(run / CONFIG, record)  # last: a folder with it is a run


def update_settings(run: Path, config: TrainConfig, changed: Sequence[str]) -> None:
    """Write settings that a resumed run was given anew, so that the next resume knows them.

    Args:
        run: The run folder.
        config: All settings as they are now.
        changed: Names of those that were given.
    """
    record = read_json(run / CONFIG, has_file_names=True)
    record["settings"] = to_dict(_with_absolute_root(config))
    record["sources"] |= dict.fromkeys(changed, "command line, at resume")
    _write_json(run / CONFIG, record)


def _with_absolute_root(config: TrainConfig) -> TrainConfig:
    """A run can be resumed from any folder."""
    data = config.data
    pairs = data.pairs.resolve() if data.pairs else None
    return replace(config, data=replace(data, root=data.root.resolve(), pairs=pairs))


def check_run_is_free(run: Path, *, overwrite: bool) -> None:
    """Raise a ConfigError or CheckpointError if a new run cannot be written to this folder."""
    if run.exists() and not run.is_dir():
        raise ConfigError(f"--out {run} is a file; expected a folder for the run.")
    if run.is_dir() and any(run.iterdir()) and not overwrite:
        raise ConfigError(
            f"--out {run} is not empty. Choose another folder, add --overwrite, or go on with its "
            f"run: dcnseg train --resume {run}"
        )
    existing = next(folder for folder in (run, *run.absolute().parents) if folder.is_dir())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"--out {run} cannot be written: there is no permission to write to {existing}. "
            "Choose another folder."
        )


def check_out_is_separate(run: Path, root: Path, splits: Splits | None = None) -> None:
    """Raise a ConfigError if writing the run could change the data, or data be taken for the run.

    Args:
        run: Where the run is to be written.
        root: The data folder.
        splits: The images and masks, once they are known.
    """
    out = run.resolve()
    if root.resolve().is_relative_to(out):
        raise ConfigError(
            f"--out {run} {'is' if root.resolve() == out else 'contains'} the data folder {root}, "
            f"whose {CLASSES} or other files the run would replace. {_OTHER_PLACE}"
        )
    for folder in _folders_of(splits or Splits()):
        if folder.is_relative_to(out) or out.is_relative_to(folder):
            relation = "contains" if folder.is_relative_to(out) else "lies in"
            relation = "is" if folder == out else relation
            raise ConfigError(
                f"--out {run} {relation} {folder}, a folder of the data's images or masks. "
                f"{_OTHER_PLACE}"
            )


def _folders_of(splits: Splits) -> list[Path]:
    """The folders of the images and of the masks, without those within them."""
    folders = {
        # Of sub/a.png, whose stem is sub/a, the folder that holds sub.
        file.parents[len(parts) - 1 if file.parts[-len(parts) : -1] == parts[:-1] else 0].resolve()
        for sample in splits.all_samples()
        for file in (sample.image, sample.mask)
        for parts in (PurePath(sample.stem).parts,)
    }
    return sorted(folders)


def is_run(folder: Path) -> bool:
    """Whether a folder's config.json is one of dcnseg's; other programs use that name, too."""
    try:
        record = read_json(folder / CONFIG, has_file_names=True)
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"dcnseg", "settings"} <= set(record)


def read_run(run: Path) -> RunRecord:
    """Read the settings of a run.

    Raises:
        CheckpointError: the folder holds no run, or its files are damaged.
    """
    path = run / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{run} has no {CONFIG}; expected a run folder of `dcnseg train`.")
    class_map = _read_classes(run / CLASSES)
    try:
        record = read_json(path, has_file_names=True)
        require(isinstance(record, dict), f"it is {short_repr(record)}; expected a JSON object.")
        config = from_dict(TrainConfig, record.get("settings"))
        sources, split = record.get("sources"), record.get("split")
        require(_is_table(sources, str), f"sources is {short_repr(sources)}; expected texts.")
        require(
            _is_table(split, list) and set(split) == set(SPLIT_NAMES),
            f"split is {short_repr(split)}; expected lists for {', '.join(SPLIT_NAMES)}.",
        )
        for name, stems in split.items():
            wrong = [stem for stem in stems if not isinstance(stem, str)]
            require(not wrong, f"split.{name} has {short_repr(wrong[:1])}; expected names.")
        return RunRecord(config, sources, split, class_map)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {summarize_error(error)}") from error


def _read_classes(path: Path) -> ClassMap:
    try:
        return ClassMap.from_dict(read_json(path))
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {summarize_error(error)}") from error


def _is_table(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


def split_stems(splits: Splits) -> dict[str, list[str]]:
    """The images of each split by their stems."""

    def stems(samples: Sequence[Sample]) -> list[str]:
        return [sample.stem for sample in samples]

    return {
        "train": stems(splits.train),
        "val": stems(splits.val),
        "test": stems(splits.test),
    }


def check_classes_are_unchanged(record: RunRecord, class_map: ClassMap) -> None:
    """Raise a DataError if the data folder no longer gives the run's classes."""
    if class_map != record.class_map:
        raise DataError(
            f"{record.config.data.root}: the classes have changed since the run began: "
            f"{', '.join(record.class_map.names)} then, {', '.join(class_map.names)} now. "
            "Put the class list back, or start a new run."
        )


def check_split_is_unchanged(record: RunRecord, splits: Splits) -> None:
    """Raise a DataError if the data folder no longer gives the run's split."""
    now = split_stems(splits)
    for name, before in record.split.items():
        gone = sorted(set(before) - set(now[name]))
        new = sorted(set(now[name]) - set(before))
        if gone or new:
            change = f"{len(gone)} gone ({gone[0]})" if gone else f"{len(new)} new ({new[0]})"
            raise DataError(
                f"{record.config.data.root}: the {name} images have changed since the run "
                f"began: {change}. Put them back, or start a new run."
            )


def append_metrics(run: Path, record: Mapping[str, Any]) -> None:
    """Add the line of an epoch to metrics.jsonl; it is on the disk afterwards."""
    path = run / METRICS
    with add_file_to_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(metrics_line(record))
        file.flush()
        os.fsync(file.fileno())


def metrics_line(record: Mapping[str, Any]) -> str:
    """The line of an epoch in metrics.jsonl."""
    return json.dumps(record, allow_nan=False) + "\n"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The epochs that metrics.jsonl tells of, in order; a line without its end is none."""
    path = run / METRICS
    if not path.is_file():
        return []
    try:
        with open_regular_file(path) as file:
            whole, _, _ = file.read().decode().rpartition("\n")
        return [_parse_metrics(line, i) for i, line in enumerate(whole.split("\n"), 1) if whole]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {summarize_error(error)}") from error


def _parse_metrics(line: str, number: int) -> dict[str, Any]:
    """The epoch that a line of metrics.jsonl tells of."""
    try:
        record = parse_json(line)
        require_json_value(record, "it")
    except (ValueError, ConfigError) as error:
        raise ValueError(f"line {number}: {error}") from error
    epoch = record.get("epoch") if isinstance(record, dict) else None
    if type(epoch) is not int or not 1 <= epoch <= MAX_COUNT:
        raise ValueError(f"line {number} is {short_repr(record)}; expected an object with an epoch")
    return dict(record)


def restore_metrics(run: Path, epoch: int, saved: str | None) -> tuple[str, list[int]]:
    """Make metrics.jsonl hold the epochs up to `epoch`; later ones will be computed again.

    Args:
        run: The run folder.
        epoch: The last that is complete.
        saved: The file's text as the resume state holds it; None if it does not, so that only what
            the file itself still has can be kept.

    Returns:
        The text, and the epochs up to `epoch` that it lacks.

    Raises:
        CheckpointError: the saved text is damaged, or the file cannot be written.
    """
    if saved is not None and not (isinstance(saved, str) and saved.isascii()):  # as JSON is here
        raise CheckpointError(f"{run / RESUME_STATE}: its copy of {METRICS} is damaged.")
    text = saved
    missing: list[int] = []
    if text is None:
        kept = [record for record in read_metrics(run) if record["epoch"] <= epoch]
        text = "".join(metrics_line(record) for record in kept)
        missing = sorted(set(range(1, epoch + 1)) - {record["epoch"] for record in kept})
    with add_file_to_errors(run / METRICS), atomic_path(run / METRICS) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text, missing


def drop_unfinished_files(run: Path) -> None:
    """Delete what a killed process was writing when it was killed."""
    for path in run.glob(".*.tmp.*"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp\.[a-z]+", path.name):
            path.unlink(missing_ok=True)


@contextmanager
def add_file_to_errors(path: Path) -> Iterator[None]:
    """Within it, a disk that is full or cannot be written is an error that names the file.

    Raises:
        CheckpointError: writing failed.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. What it held before is intact; "
            "make room or give permission, then go on with the run."
        ) from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with add_file_to_errors(path), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
