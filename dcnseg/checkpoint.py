"""Weights files and resume states: versioned, written whole, and opened without running code.

A weights file is a .safetensors file whose metadata holds the model's configuration, its classes
and its preprocessing, so that it is enough to predict with. A resume state is a `torch.save` file
of tensors and plain values, read by an allow-list (`safe_load.load_tensors`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dcnseg import __version__
from dcnseg.config import (
    MAX_COUNT,
    ModelConfig,
    Preprocessing,
    TrainConfig,
    from_dict,
    to_dict,
)
from dcnseg.data.class_map import ClassMap
from dcnseg.errors import CheckpointError, ConfigError, short_repr
from dcnseg.files import atomic_path, open_regular_file, parse_json
from dcnseg.models.segmenter import Segmenter, build_segmenter
from dcnseg.safe_load import (
    check_finite,
    check_safetensors,
    is_torch_file,
    load_tensors,
    one_line,
    printable,
    unreadable,
)
from dcnseg.validation import check_fields, require, require_between, require_json_value

BEST_WEIGHTS = "best.safetensors"
RESUME_STATE = "last.ckpt"
FORMAT_VERSION = 1
METADATA_KEY = "dcnseg"


@dataclass(frozen=True)
class TrainingDataStats:
    """What the training images were like, so that an image unlike them can be told.

    Attributes:
        num_images: How many there were.
        min_size_hw: Least height and least width in pixels (maybe of different images).
        max_size_hw: Greatest height and greatest width.
        gray_share: Share of images without colors, in [0, 1], estimated from a few.
    """

    num_images: int
    min_size_hw: tuple[int, int]
    max_size_hw: tuple[int, int]
    gray_share: float

    def __post_init__(self) -> None:
        """Check what a file may have damaged."""
        check_fields(self)
        for side in (*self.min_size_hw, *self.max_size_hw, self.num_images + 1):
            require_between("a side or the number of training images", side, 1, MAX_COUNT)
        require_between("gray_share", self.gray_share, 0, 1)


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says about itself, beside its tensors."""

    path: Path
    model: ModelConfig
    class_map: ClassMap
    preprocessing: Preprocessing
    scores: Mapping[str, Any]  # of the epoch that the weights come from, empty if unknown
    dcnseg_version: str
    training_data: TrainingDataStats | None = None  # None in files of versions that did not note it


def find_weights(run: Path) -> Path:
    """The weights file that RUN means: the file itself, or the best weights of a run folder.

    Raises:
        CheckpointError: there is no such file or folder, or the run has no weights yet.
    """
    if run.is_file():
        return run
    if not run.exists():
        raise CheckpointError(f"{run}: no such run folder or weights file.")
    if not run.is_dir():
        raise CheckpointError(
            f"{run} is not a regular file; expected a run folder or weights file."
        )
    path = run / BEST_WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{run} has no {BEST_WEIGHTS}; expected a run folder of `dcnseg train` that has "
            "been evaluated once, or a weights file."
        )
    return path


def save_weights(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    model: ModelConfig,
    class_map: ClassMap,
    preprocessing: Preprocessing,
    scores: Mapping[str, Any],
    training_data: TrainingDataStats | None = None,
) -> None:
    """Write a weights file; it appears whole or not at all."""
    header = {
        "format": FORMAT_VERSION,
        "dcnseg": __version__,
        "model": to_dict(model),
        "classes": class_map.to_dict(),
        "preprocessing": to_dict(preprocessing),
        "scores": dict(scores),
        "training_data": None if training_data is None else to_dict(training_data),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(path) as temporary:
        # Not save_file, whose files only their owner can read.
        temporary.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(header)}))


def read_weights_info(path: Path) -> WeightsInfo:
    """Read what a weights file says about itself, without its tensors.

    Raises:
        CheckpointError: the file is broken, was not written by dcnseg, or by a newer version.
    """
    if METADATA_KEY not in (metadata := _read_metadata(path)):
        raise CheckpointError(
            f"{path} was not written by dcnseg: its metadata does not describe model and classes."
        )
    try:
        return _parse_info(path, parse_json(metadata[METADATA_KEY]))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: its description is damaged: {one_line(error)}") from error


def _parse_info(path: Path, header: Any) -> WeightsInfo:
    """The description of a weights file from its JSON; a ConfigError says what is wrong in it."""
    require(isinstance(header, dict), f"it is {short_repr(header)}; expected a JSON object.")
    version, writer = header.get("format"), header.get("dcnseg")
    require(type(version) is int, f"format is {short_repr(version)}; expected a whole number.")
    require(isinstance(writer, str), f"dcnseg is {short_repr(writer)}; expected a version.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {short_repr(version)}, written by dcnseg {printable(writer)}; "
            f"dcnseg {__version__} reads up to {FORMAT_VERSION}. Install a newer dcnseg."
        )
    scores, seen = header.get("scores"), header.get("training_data")
    check_scores(scores, "scores")
    return WeightsInfo(
        path=path,
        model=from_dict(ModelConfig, header.get("model")),
        class_map=ClassMap.from_dict(header.get("classes")),
        preprocessing=from_dict(Preprocessing, header.get("preprocessing")),
        scores=scores,
        dcnseg_version=printable(writer),
        training_data=None if seen is None else from_dict(TrainingDataStats, seen),
    )


def check_scores(scores: Any, name: str) -> None:
    """Raise a ConfigError unless these are the scores of an epoch as a file holds them."""
    require(isinstance(scores, dict), f"{name} is {short_repr(scores)}; expected a JSON object.")
    require_json_value(scores, name)
    mean_iou = scores.get("mean_iou")
    is_valid = mean_iou is None or (type(mean_iou) in (int, float) and 0 <= mean_iou <= 1)
    require(is_valid, f"{name} has the mean_iou {short_repr(mean_iou)}; expected 0..1 or nothing.")


def load_segmenter(path: Path) -> tuple[Segmenter, WeightsInfo]:
    """Rebuild the network of a weights file, in evaluation mode on the CPU.

    Every tensor of the network comes from the file.

    Raises:
        CheckpointError: the file is broken, or its tensors do not fit its own description; the
            message names the difference.
    """
    info = read_weights_info(path)
    tensors = load_tensors(path)
    _check_head(info, tensors)
    # First without memory, so that a description cannot make a network larger than the file.
    differences = _differences(_build(info, "meta", "cpu").state_dict(), tensors)
    if differences:
        raise CheckpointError(
            f"{path}: its tensors do not fit the {info.model.architecture} with "
            f"{info.model.encoder} that it describes: {'; '.join(differences)}."
        )
    model = _build(info, "cpu")
    model.load_state_dict(tensors)
    check_finite(model.state_dict(), str(path))  # as the network holds them, mostly in float32
    return model.eval(), info


def _read_metadata(path: Path) -> Mapping[str, str]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file.")
    try:
        with open_regular_file(path) as file:
            if is_torch_file(file):
                raise CheckpointError(
                    f"{path} is a file of torch.save, which does not describe model and classes; "
                    f"expected a weights file of `dcnseg train` such as {BEST_WEIGHTS}."
                )
            check_safetensors(file)
        with safe_open(path, framework="pt") as tensors:
            return tensors.metadata() or {}
    except CheckpointError:
        raise
    # Any exception: on arbitrary bytes the reader raises whatever its parsing stumbles over.
    except Exception as error:
        raise unreadable(path, error) from error


def _check_head(info: WeightsInfo, tensors: Mapping[str, Tensor]) -> None:
    """Compare the last layer with the number of classes, whose difference is the most common."""
    shapes = [
        list(value.shape)
        for name, value in tensors.items()
        if name.startswith("segmentation_head.") and value.dim() == 4
    ]
    expected = [info.class_map.num_classes, info.model.decoder_channels]
    if not shapes or shapes[-1][:2] != expected:
        found = f"{shapes[-1][0]} and {shapes[-1][1]}" if shapes else "none"
        raise CheckpointError(
            f"{info.path}: it describes {expected[0]} classes and {expected[1]} decoder channels, "
            f"but the head among its tensors has {found}."
        )


def _build(info: WeightsInfo, device: str, fallback: str | None = None) -> Segmenter:
    """The network that a file describes, with random weights; on "meta" it takes no memory.

    Args:
        info: The description.
        device: Where the weights are.
        fallback: Where they are for encoders that cannot be built there.
    """
    try:
        with torch.device(device):
            return build_segmenter(info.model, info.class_map.num_classes)
    # Any exception: the description may hold any value, and encoders refuse in their own ways.
    except Exception as error:
        # Of smp's mit_b0 to mit_b5. What cannot be built for another reason must not be built
        # here either: an encoder may have billions of weights.
        if fallback is not None and "meta tensors" in str(error):
            return _build(info, fallback)
        raise CheckpointError(
            f"{info.path} describes a network that cannot be built: {one_line(error)}"
        ) from error


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What keeps the tensors of a file from those of a network, one part per kind."""
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    reshaped = [
        f"{name} is {list(given[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    retyped = [
        f"{name} is {given[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in given and given[name].is_floating_point() != own[name].is_floating_point()
    ]
    return [
        f"{len(items)} of {len(own)} tensors {text} ({_first(items)})"
        for items, text in (
            (missing, "are missing"),
            (reshaped, "have another shape"),
            (retyped, "have another type"),
        )
        if items
    ] + ([f"{len(unexpected)} tensors are unexpected ({_first(unexpected)})"] if unexpected else [])


def _first(names: Sequence[str], count: int = 2) -> str:
    return ", ".join(printable(name) for name in names[:count]) + (
        ", ..." if len(names) > count else ""
    )


def save_resume_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a training run; it appears whole or not at all.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    content = {"format": FORMAT_VERSION, "dcnseg": __version__, **state}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's writer stumbles over its own half file and hides what the disk said.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load_resume_state(path: Path) -> dict[str, Any]:
    """Read the state of a training run on the CPU.

    Raises:
        CheckpointError: there is no such file, or it is broken, or of a newer format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; there is nothing to resume.")
    state = load_tensors(path)
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is not int or version > FORMAT_VERSION:
        raise CheckpointError(f"{path} is not a resume state of dcnseg up to {__version__}.")
    try:
        _check_resume_state(state)
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return dict(state)


def _check_resume_state(state: Mapping[str, Any]) -> None:
    """Check what is looked at before there is a network that the rest can be compared with."""
    for name in ("epoch", "best_epoch", "skipped_in_a_row"):
        count = state.get(name, None if name == "epoch" else 0)
        require(
            type(count) is int and 0 <= count <= MAX_COUNT,
            f"{name} is {short_repr(count)}; expected a whole number from 0 to {MAX_COUNT}.",
        )
    if (scores := state.get("best_scores")) is not None:
        check_scores(scores, "best_scores")
    if settings := state.get("settings"):  # none in states of versions that did not note them
        from_dict(TrainConfig, settings)
