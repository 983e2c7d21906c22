"""Loading tensor files from untrusted sources without running code; entry point `load_tensors`.

A small file can declare a large size: a header of exabytes, a zip entry that expands a
thousandfold, a storage longer than its data. Declared sizes are compared with the file size before
anything is allocated, so time and memory are proportional to the file size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

from safetensors.torch import load_file
from torch import Tensor

from dcnseg.errors import CheckpointError
from dcnseg.files import open_regular_file, parse_json
from dcnseg.tensor_pickle import MAX_DIMENSIONS
from dcnseg.torch_file import LEGACY_STARTS, MAX_HEADER_BYTES, ZIP_START, read_torch_file

MAX_SHOWN_CHARACTERS: Final = 300
# The dtypes that network layers use and all torch operations support.
_SAFETENSORS_TYPES: Final = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def load_tensors(path: Path) -> Any:
    """Load a .safetensors file, or a `torch.save` file of tensors and plain values, on the CPU.

    The format is detected from the content, not from the file name.

    Raises:
        CheckpointError: The file cannot be read or declares more data than it has; the message
            names it.
    """
    try:
        with open_regular_file(path) as file:
            if is_torch_file(file):
                return read_torch_file(file, os.fstat(file.fileno()).st_size)
            check_safetensors(file)
        return load_file(path)
    except Exception as error:  # on arbitrary bytes the readers raise exceptions of any type
        raise make_read_error(path, error) from error


def make_read_error(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a weights file whose reader raised `error`."""
    return CheckpointError(
        f"{path} cannot be read as weights: {summarize_error(error).rstrip('.')}."
    )


def summarize_error(error: Exception) -> str:
    """Return the first line of an exception's message, or its type if there is none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, LookupError):  # the message of a LookupError is only the key
        return sanitize(f"{type(error).__name__} {''.join(lines)}".strip())
    return sanitize(lines[0])


def sanitize(text: str) -> str:
    """Shorten a text from a file and replace control characters, which could alter a terminal."""
    shown = text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[: MAX_SHOWN_CHARACTERS - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in shown)


def is_torch_file(file: IO[bytes]) -> bool:
    """Whether an open file starts like those of `torch.save`; the position is reset to 0."""
    start = file.read(9)
    file.seek(0)
    # The first 8 bytes of a safetensors file, its header's length, may look like a pickle; the
    # JSON header follows.
    is_legacy = start.startswith(LEGACY_STARTS) and not start.endswith(b"{")
    return is_legacy or start.startswith(ZIP_START)


def check_safetensors(file: IO[bytes]) -> None:
    """Check the size, dtypes and dimensions in the header of a safetensors file.

    The safetensors library then compares the size of each tensor with its data.

    Raises:
        ValueError: The header is invalid or does not fit into the file.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError(f"the file has only {size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"the file has {size} bytes, but its first 8 bytes declare a header of {length} bytes "
            f"(at most {MAX_HEADER_BYTES}). It is truncated or not a safetensors file"
        )
    header = parse_json(file.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    for name, tensor in header.items():
        if name != "__metadata__":
            _check_tensor_header(sanitize(name), tensor)


def _check_tensor_header(name: str, tensor: Any) -> None:
    shape = tensor.get("shape") if isinstance(tensor, dict) else None
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"the header has no shape of at most {MAX_DIMENSIONS} dimensions for {name}"
        )
    if (dtype := tensor.get("dtype")) not in _SAFETENSORS_TYPES:
        raise ValueError(
            f"{name} has the dtype {sanitize(str(dtype))}; expected one of "
            f"{', '.join(_SAFETENSORS_TYPES)}"
        )


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise a CheckpointError that names the first tensor with NaN or infinity."""
    for name, tensor in tensors.items():
        num_invalid = int((~tensor.isfinite()).sum())
        if num_invalid:
            raise CheckpointError(
                f"{source}: {num_invalid} of the {tensor.numel()} values of {sanitize(name)} are "
                "not finite. The file is damaged, or the training that wrote it diverged."
            )
