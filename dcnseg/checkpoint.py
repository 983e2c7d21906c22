"""Weights files and resume states: versioned, written whole, and opened without running code.

A weights file is a .safetensors file whose metadata holds the model's configuration, its classes
and its preprocessing, so that it is enough to predict with. A resume state is a `torch.save` file
of tensors and plain values, read with `weights_only=True`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dcnseg import __version__
from dcnseg.config import ModelConfig, Preprocessing, from_dict, to_dict
from dcnseg.data.class_map import ClassMap
from dcnseg.errors import CheckpointError, DcnsegError
from dcnseg.files import atomic_path
from dcnseg.models.segmenter import Segmenter, build_segmenter
from dcnseg.safe_load import load_tensors

BEST_WEIGHTS = "best.safetensors"
RESUME_STATE = "last.ckpt"
FORMAT_VERSION = 1
METADATA_KEY = "dcnseg"


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says about itself, beside its tensors."""

    path: Path
    model: ModelConfig
    class_map: ClassMap
    preprocessing: Preprocessing
    scores: Mapping[str, Any]  # of the epoch that the weights come from, empty if unknown
    dcnseg_version: str


def find_weights(run: Path) -> Path:
    """The weights file that RUN means: the file itself, or the best weights of a run folder.

    Raises:
        CheckpointError: there is no such file or folder, or the run has no weights yet.
    """
    if run.is_file():
        return run
    if not run.exists():
        raise CheckpointError(f"{run}: no such run folder or weights file.")
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
) -> None:
    """Write a weights file; it appears whole or not at all."""
    header = {
        "format": FORMAT_VERSION,
        "dcnseg": __version__,
        "model": to_dict(model),
        "classes": class_map.to_dict(),
        "preprocessing": to_dict(preprocessing),
        "scores": dict(scores),
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
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a weights file: {error}") from error
    if METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} was not written by dcnseg: its metadata does not describe model and classes."
        )
    try:
        header = json.loads(metadata[METADATA_KEY])
        if header["format"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {header['format']}, written by dcnseg {header['dcnseg']}; "
                f"dcnseg {__version__} reads up to {FORMAT_VERSION}. Install a newer dcnseg."
            )
        return WeightsInfo(
            path=path,
            model=from_dict(ModelConfig, header["model"]),
            class_map=ClassMap.from_dict(header["classes"]),
            preprocessing=from_dict(Preprocessing, header["preprocessing"]),
            scores=header["scores"],
            dcnseg_version=header["dcnseg"],
        )
    except CheckpointError:
        raise
    except (DcnsegError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description is damaged: {error}") from error


def load_segmenter(path: Path) -> tuple[Segmenter, WeightsInfo]:
    """Rebuild the network of a weights file, in evaluation mode on the CPU.

    Raises:
        CheckpointError: the file is broken, or its tensors do not fit its own description.
    """
    info = read_weights_info(path)
    model = build_segmenter(info.model, info.class_map.num_classes)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a weights file: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: its tensors do not fit the {info.model.architecture} with "
            f"{info.model.encoder} that it describes: {_first_difference(str(error))}"
        ) from error
    return model.eval(), info


def save_resume_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a training run; it appears whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT_VERSION, "dcnseg": __version__, **state}, temporary)


def load_resume_state(path: Path) -> dict[str, Any]:
    """Read the state of a training run on the CPU.

    Raises:
        CheckpointError: there is no such file, or it is broken, or of a newer format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; there is nothing to resume.")
    state = load_tensors(path)
    if not isinstance(state, dict) or state.get("format", FORMAT_VERSION + 1) > FORMAT_VERSION:
        raise CheckpointError(f"{path} is not a resume state of dcnseg up to {__version__}.")
    return dict(state)


def _first_difference(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else lines[0]
