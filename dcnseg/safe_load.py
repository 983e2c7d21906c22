"""Reading files of tensors from anywhere without running their code; entry point `load_tensors`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dcnseg.errors import CheckpointError


def load_tensors(path: Path) -> Any:
    """Read a .safetensors file, or a `torch.save` file of tensors and plain values, on the CPU.

    Raises:
        CheckpointError: the file cannot be read; the message names it.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files that are no pickle
            return torch.load(path, map_location="cpu", weights_only=True)
    # Any exception: on arbitrary bytes the reader raises whatever its parsing stumbles over.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as weights: {reason}") from error
