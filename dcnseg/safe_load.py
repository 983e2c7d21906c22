"""Reading files of tensors from anywhere without running their code; entry point `load_tensors`.

A small file can claim to hold much: a header of exabytes, a zip entry that unpacks to a thousand
times its size, a storage longer than the bytes behind it. What a file claims is therefore compared
with the file's size before anything of that size is reserved, and reading takes time and memory in
proportion to that size.
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
from dcnseg.torch_file import LEGACY_STARTS, MAX_DESCRIPTION_BYTES, ZIP_START, read_torch_file

MAX_SHOWN: Final = 300  # characters of a text of a file's in a message
# Those that layers of a network can hold and every operation of torch knows.
_SAFETENSORS_TYPES: Final = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def load_tensors(path: Path) -> Any:
    """Read a .safetensors file, or a `torch.save` file of tensors and plain values, on the CPU.

    Which of the two it is shows in the content, whatever the name says.

    Raises:
        CheckpointError: the file cannot be read, or claims to hold more than there is; the message
            names it.
    """
    try:
        with open_regular_file(path) as file:
            if is_torch_file(file):
                return read_torch_file(file, os.fstat(file.fileno()).st_size)
            check_safetensors(file)
        return load_file(path)
    # Any exception: on arbitrary bytes the readers raise whatever their parsing stumbles over.
    except Exception as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file on which a reader has raised `error`."""
    return CheckpointError(f"{path} cannot be read as weights: {one_line(error).rstrip('.')}.")


def one_line(error: Exception) -> str:
    """What a reader's exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, LookupError):  # the text of a LookupError is the key alone
        return printable(f"{type(error).__name__} {''.join(lines)}".strip())
    return printable(lines[0])


def printable(text: str) -> str:
    """A text of a file's, shortened, without the characters that move a terminal's cursor."""
    shown = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
    return "".join(c if c.isprintable() else "?" for c in shown)


def is_torch_file(file: IO[bytes]) -> bool:
    """Whether a file begins as those of `torch.save` do; it is left at its beginning."""
    start = file.read(9)
    file.seek(0)
    # The length of a safetensors file's header may be any number; the header itself follows it.
    is_legacy = start.startswith(LEGACY_STARTS) and not start.endswith(b"{")
    return is_legacy or start.startswith(ZIP_START)


def check_safetensors(file: IO[bytes]) -> None:
    """See that a safetensors file's header fits into the file and describes ordinary tensors.

    The library then compares the size of each tensor with the bytes that are there.

    Raises:
        ValueError: it does not; the message says what is wrong.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError(f"it has {size} bytes only")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_DESCRIPTION_BYTES):
        raise ValueError(
            f"its first 8 bytes announce a header of {length} bytes, and the file has {size} (a "
            f"header may have {MAX_DESCRIPTION_BYTES}). It is no safetensors file, or cut off"
        )
    header = parse_json(file.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    for name, tensor in header.items():
        if name != "__metadata__":
            _check_description(name, tensor)


def _check_description(name: str, tensor: Any) -> None:
    shape = tensor.get("shape") if isinstance(tensor, dict) else None
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(
            f"{printable(name)} has no shape of at most {MAX_DIMENSIONS} dimensions in its header"
        )
    if (kind := tensor.get("dtype")) not in _SAFETENSORS_TYPES:
        raise ValueError(
            f"{printable(name)} has the type {printable(str(kind))}; expected one of "
            f"{', '.join(_SAFETENSORS_TYPES)}"
        )


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise a CheckpointError that names the first tensor with a value that is no number."""
    for name, tensor in tensors.items():
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            raise CheckpointError(
                f"{source}: {wrong} of the {tensor.numel()} values of {printable(name)} are not "
                "finite. The file is damaged, or the training that wrote it had diverged."
            )
