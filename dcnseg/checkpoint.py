"""Weights files and checkpoints: versioned, written atomically, and loaded without running code.

A weights file is a .safetensors file whose metadata holds the model configuration, the classes and
the preprocessing, so prediction needs no other file. A checkpoint is a `torch.save` file of tensors
and plain values to resume a run from, read with an allow-list (`safe_load.load_tensors`).
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
    EXPORT_SUFFIXES,
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
    make_read_error,
    sanitize,
    summarize_error,
)
from dcnseg.validation import check_fields, require, require_between, require_json_value

BEST_WEIGHTS = "best.safetensors"
RESUME_STATE = "last.ckpt"
FORMAT_VERSION = 1
METADATA_KEY = "dcnseg"


@dataclass(frozen=True)
class TrainingDataStats:
    """Statistics of the training images, used to warn about images that differ from them."""

    num_images: int
    min_size_hw: tuple[int, int]  # smallest height and width in pixels, maybe of different images
    max_size_hw: tuple[int, int]  # largest height and width in pixels
    gray_share: float  # share of gray images, in [0, 1], estimated from up to 16 images

    def __post_init__(self) -> None:
        """Check the values, which a damaged file may have changed."""
        check_fields(self)
        for side in (*self.min_size_hw, *self.max_size_hw, self.num_images + 1):
            require_between("an image side or count of the training data", side, 1, MAX_COUNT)
        require_between("gray_share", self.gray_share, 0, 1)


@dataclass(frozen=True)
class WeightsInfo:
    """The metadata of a weights file."""

    path: Path
    model: ModelConfig
    class_map: ClassMap
    preprocessing: Preprocessing
    scores: Mapping[str, Any]  # of the epoch of the weights; empty if unknown
    dcnseg_version: str
    training_data: TrainingDataStats | None = None  # None in files of earlier versions


def find_weights(run: Path) -> Path:
    """Return the weights file for RUN: the file itself, or the best weights of a run folder.

    Raises:
        CheckpointError: The file or folder does not exist, or the run has no weights yet.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        problem = "is not a regular file" if run.exists() else "does not exist"
        raise CheckpointError(f"{run} {problem}; expected a run folder or weights file.")
    path = run / BEST_WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{run} has no {BEST_WEIGHTS}; expected a weights file, or a run folder of `dcnseg "
            "train` with at least one validated epoch."
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
    """Write a weights file atomically."""
    info = WeightsInfo(path, model, class_map, preprocessing, scores, __version__, training_data)
    header = make_header(info)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(path) as temporary:
        # save_file would make it readable by the owner only.
        temporary.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(header)}))


def make_header(info: WeightsInfo) -> dict[str, Any]:
    """Return the metadata of a weights file as JSON values; `parse_header` reads them."""
    seen = info.training_data
    return {
        "format": FORMAT_VERSION,
        "dcnseg": info.dcnseg_version,
        "model": _model_settings(info.model),
        "classes": info.class_map.to_dict(),
        "preprocessing": to_dict(info.preprocessing),
        "scores": dict(info.scores),
        "training_data": None if seen is None else to_dict(seen),
    }


def _model_settings(model: ModelConfig) -> dict[str, Any]:
    """The settings for the metadata, without those of a region head if there is none."""
    settings = to_dict(model)
    if model.region_head == "none":
        return {k: value for k, value in settings.items() if not k.startswith("region_")}
    return settings


def read_weights_info(path: Path) -> WeightsInfo:
    """Read the metadata of a weights file without loading its tensors.

    Raises:
        CheckpointError: The file is damaged, not written by dcnseg, or of a newer format.
    """
    if METADATA_KEY not in (metadata := _read_metadata(path)):
        raise CheckpointError(
            f"{path} was not written by dcnseg: its metadata has no {METADATA_KEY!r} entry."
        )
    return parse_header(path, metadata[METADATA_KEY])


def parse_header(path: Path, text: str) -> WeightsInfo:
    """Parse the JSON text of a file's metadata; raises a CheckpointError if it is damaged."""
    try:
        return _parse_info(path, parse_json(text))
    except (ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: its metadata is damaged: {summarize_error(error)}"
        ) from error


def _parse_info(path: Path, header: Any) -> WeightsInfo:
    """Parse the metadata of a file; raises a ConfigError if a value is invalid."""
    require(isinstance(header, dict), f"expected a JSON object, found {short_repr(header)}.")
    version, writer = header.get("format"), header.get("dcnseg")
    require(type(version) is int, f"format is {short_repr(version)}; expected an integer.")
    require(isinstance(writer, str), f"dcnseg is {short_repr(writer)}; expected a version string.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {short_repr(version)}, written by dcnseg {sanitize(writer)}; "
            f"dcnseg {__version__} reads formats up to {FORMAT_VERSION}. Install a newer version "
            "of dcnseg."
        )
    scores, seen = header.get("scores"), header.get("training_data")
    check_scores(scores, "scores")
    return WeightsInfo(
        path=path,
        model=from_dict(ModelConfig, header.get("model")),
        class_map=ClassMap.from_dict(header.get("classes")),
        preprocessing=from_dict(Preprocessing, header.get("preprocessing")),
        scores=scores,
        dcnseg_version=sanitize(writer),
        training_data=None if seen is None else from_dict(TrainingDataStats, seen),
    )


def check_scores(scores: Any, name: str) -> None:
    """Raise a ConfigError unless these are valid scores of an epoch in a file."""
    require(isinstance(scores, dict), f"{name} is {short_repr(scores)}; expected a JSON object.")
    require_json_value(scores, name)
    mean_iou = scores.get("mean_iou")
    is_valid = mean_iou is None or (type(mean_iou) in (int, float) and 0 <= mean_iou <= 1)
    require(is_valid, f"{name} has the mean_iou {short_repr(mean_iou)}; expected 0 to 1.")


def load_segmenter(path: Path) -> tuple[Segmenter, WeightsInfo]:
    """Load the network of a weights file, in evaluation mode on the CPU.

    Raises:
        CheckpointError: The file is damaged, or its tensors do not match the model in its metadata;
            the message lists the differences.
    """
    info = read_weights_info(path)
    tensors = load_tensors(path)
    _check_head(info, tensors)
    # On "meta" first, so that damaged metadata cannot allocate a network larger than the file.
    differences = _compare_state_dicts(_build(info, "meta", "cpu").state_dict(), tensors)
    if differences:
        raise CheckpointError(
            f"{path}: its tensors do not fit the {info.model.architecture} with encoder "
            f"{info.model.encoder} in its metadata: {'; '.join(differences)}."
        )
    model = _build(info, "cpu")
    model.load_state_dict(tensors)
    check_finite(model.state_dict(), str(path))  # after conversion to the model's dtype
    return model.eval(), info


def _read_metadata(path: Path) -> Mapping[str, str]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a weights file.")
    if path.suffix == EXPORT_SUFFIXES["onnx"]:
        raise CheckpointError(
            f"{path} is an exported model, which only `dcnseg predict` and `dcnseg evaluate` run; "
            "expected a run folder or weights file."
        )
    try:
        with open_regular_file(path) as file:
            if is_torch_file(file):
                raise CheckpointError(
                    f"{path} is a torch.save file, which contains no model settings or classes; "
                    f"expected a weights file of `dcnseg train` such as {BEST_WEIGHTS}."
                )
            check_safetensors(file)
        with safe_open(path, framework="pt") as tensors:
            return tensors.metadata() or {}
    except CheckpointError:
        raise
    except Exception as error:  # on arbitrary bytes the reader raises exceptions of any type
        raise make_read_error(path, error) from error


def _check_head(info: WeightsInfo, tensors: Mapping[str, Tensor]) -> None:
    """Check the shape of the last layer first, because a wrong number of classes is common."""
    shapes = [
        list(value.shape)
        for name, value in tensors.items()
        if name.startswith("segmentation_head.") and value.dim() == 4
    ]
    expected = [info.class_map.num_classes, info.model.decoder_channels]
    if info.model.architecture == "plain" and shapes:
        expected[1] = shapes[-1][1]  # the channels of the encoder
    if not shapes or shapes[-1][:2] != expected:
        found = f"has {shapes[-1][0]} and {shapes[-1][1]}" if shapes else "is missing"
        raise CheckpointError(
            f"{info.path}: its metadata has {expected[0]} classes and {expected[1]} decoder "
            f"channels, but its segmentation head {found}."
        )


def _build(info: WeightsInfo, device: str, fallback: str | None = None) -> Segmenter:
    """Build the network of a weights file with random weights.

    The device "meta" allocates no memory; encoders that do not support it use `fallback`.
    """
    try:
        with torch.device(device):
            return build_segmenter(info.model, info.class_map.num_classes)
    except Exception as error:  # each encoder family raises its own exceptions
        # smp's mit_b0 to mit_b5 cannot be built on "meta". Nothing else is built again, because an
        # encoder may have billions of weights.
        if fallback is not None and "meta tensors" in str(error):
            return _build(info, fallback)
        raise CheckpointError(
            f"{info.path}: the network in its metadata cannot be built: {summarize_error(error)}"
        ) from error


def _compare_state_dicts(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """List how the tensors of a file differ from those of a network, one text per kind."""
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
    counted = (
        (missing, f"of {len(own)} missing"),
        (reshaped, f"of {len(own)} with a wrong shape"),
        (retyped, f"of {len(own)} with a wrong dtype"),
        (unexpected, "unexpected"),
    )
    return [f"{len(items)} {text} ({_format_names(items)})" for items, text in counted if items]


def _format_names(names: Sequence[str], count: int = 2) -> str:
    return ", ".join(map(sanitize, names[:count])) + (", ..." if len(names) > count else "")


def save_resume_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the checkpoint of a training run atomically.

    Raises:
        OSError: The folder cannot be written or the disk is full.
    """
    content = {"format": FORMAT_VERSION, "dcnseg": __version__, **state}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's writer fails again when it closes the file, which hides the disk's error.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load_resume_state(path: Path) -> dict[str, Any]:
    """Load the checkpoint of a training run on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, or of a newer format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}, so the run cannot be resumed.")
    state = load_tensors(path)
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is not int or version > FORMAT_VERSION:
        raise CheckpointError(f"{path} is not a checkpoint of dcnseg {__version__} or earlier.")
    try:
        _check_resume_state(state)
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return dict(state)


def _check_resume_state(state: Mapping[str, Any]) -> None:
    """Check the values that are used before the network is built."""
    for name in ("epoch", "best_epoch", "skipped_in_a_row"):
        count = state.get(name, None if name == "epoch" else 0)
        require(
            type(count) is int and 0 <= count <= MAX_COUNT,
            f"{name} is {short_repr(count)}; expected an integer from 0 to {MAX_COUNT}.",
        )
    if (scores := state.get("best_scores")) is not None:
        check_scores(scores, "best_scores")
    if settings := state.get("settings"):  # missing in checkpoints of earlier versions
        from_dict(TrainConfig, settings)
