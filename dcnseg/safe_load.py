"""Reading files of tensors from anywhere without running their code; entry point `load_tensors`.

A small file can claim to hold much: a header of exabytes, a zip entry that unpacks to a thousand
times its size, a storage longer than the bytes behind it. What a file claims is therefore compared
with the file's size before anything of that size is reserved.
"""

from __future__ import annotations

import io
import pickle
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from dcnseg.errors import CheckpointError

# A description takes 100 to 200 bytes per tensor, so this is enough for 100 000 of them. Python
# objects take up to 64 times the bytes of the pickle they come from.
MAX_DESCRIPTION_BYTES: Final = 16 * 2**20
_ZIP_START: Final = b"PK\x03\x04"
_PICKLE_START: Final = b"\x80\x02"
_OPCODES: Final = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.EMPTY_SET, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_TUPLE),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.GLOBAL, pickle.REDUCE),
    *(pickle.BUILD, pickle.NEWOBJ, pickle.BINPERSID, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.BINPUT, pickle.LONG_BINPUT),
)
_STORAGE_BYTES: Final = {
    "ComplexDouble": 16,
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Byte", "Char", "Bool", "Untyped", "QUInt8", "QInt8"), 1),
    **dict.fromkeys(("QUInt4x2", "QUInt2x4"), 1),
}


def load_tensors(path: Path) -> Any:
    """Read a .safetensors file, or a `torch.save` file of tensors and plain values, on the CPU.

    Which of the two it is shows in the content, whatever the name says.

    Raises:
        CheckpointError: the file cannot be read, or claims to hold more than there is; the message
            names it.
    """
    try:
        if is_torch_file(path):
            return _load_torch(path)
        check_safetensors(path)
        return load_file(path)
    except CheckpointError:
        raise
    # Any exception: on arbitrary bytes the readers raise whatever their parsing stumbles over.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as weights: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What a reader's exception says, in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    # torch's refusal of a pickle has several paragraphs of advice around what was wrong.
    telling = [line for line in lines if "Unsupported" in line] or lines
    if not telling or isinstance(error, LookupError):  # the text of a LookupError is the key alone
        return printable(f"{type(error).__name__} {''.join(telling)}".strip())
    return printable(telling[0].strip())


def printable(text: str) -> str:
    """A text of a file's, without the characters that move a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def is_torch_file(path: Path) -> bool:
    """Whether the file begins as those of `torch.save` do."""
    return _head(path, 4).startswith((_ZIP_START, _PICKLE_START))


def check_safetensors(path: Path) -> None:
    """See that a safetensors file's header fits into the file and is not larger than sensible.

    The library then compares the size of each tensor with the bytes that are there.

    Raises:
        CheckpointError: it does not; the message gives both sizes.
    """
    size = _size(path)
    if size < 8:
        raise CheckpointError(f"{path} cannot be read as weights: it has {size} bytes only.")
    header = int.from_bytes(_head(path, 8), "little")
    if header > min(size - 8, MAX_DESCRIPTION_BYTES):
        raise CheckpointError(
            f"{path} cannot be read as weights: its first 8 bytes announce a header of {header} "
            f"bytes, and the file has {size} (a header may have {MAX_DESCRIPTION_BYTES}). It is "
            "no safetensors file, or cut off."
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


def _load_torch(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the pickle protocol of files that are no pickle
        if _head(path, 4) == _ZIP_START:
            _check_zip(path)
        else:
            _check_legacy(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_zip(path: Path) -> None:
    """See that no entry is compressed or damaged, and that each storage has what it claims."""
    size = _size(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        sizes = {entry.filename: entry.file_size for entry in entries}
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in entries) > size:
            raise CheckpointError(
                f"{path} is refused: its {len(entries)} entries claim "
                f"{sum(entry.file_size for entry in entries)} bytes in a file of {size}, "
                f"{len(packed)} of them compressed; torch.save compresses none."
            )
        roots = {name.partition("/")[0] for name in sizes}
        (root,) = roots if len(roots) == 1 and len(sizes) == len(entries) else ("",)
        description = f"{root}/data.pkl"
        if description not in sizes:
            raise CheckpointError(f"{path} is a zip archive, but not one of torch.save.")
        if sizes[description] > MAX_DESCRIPTION_BYTES:
            raise CheckpointError(
                f"{path} is refused: its description has {sizes[description]} bytes; expected at "
                f"most {MAX_DESCRIPTION_BYTES}."
            )
        damaged = archive.testzip()  # torch.load does not compare the checksums of tensors
        if damaged is not None:
            raise CheckpointError(
                f"{path} is damaged: its part {printable(damaged)} does not have the checksum "
                "it had."
            )
        claims = _claims(io.BytesIO(archive.read(description)))
    for key, claimed in claims.items():
        there = sizes.get(f"{root}/data/{key}", 0)
        if claimed > there:
            raise CheckpointError(
                f"{path} is refused: its storage {printable(key)} claims {claimed} bytes, but has "
                f"{there}."
            )


def _check_legacy(path: Path) -> None:
    """See that the storages of a file from before torch 1.6 claim no more than the file's size."""
    stream = io.BytesIO(_head(path, MAX_DESCRIPTION_BYTES))
    for _ in ("magic number", "protocol", "system"):
        _claims(stream)
    claimed = sum(_claims(stream).values())
    if claimed > _size(path):
        raise CheckpointError(
            f"{path} is refused: its storages claim {claimed} bytes in a file of {_size(path)}."
        )


def _claims(stream: io.BytesIO) -> dict[str, int]:
    """Bytes that each storage claims in the pickle that comes next, by the storage's key."""
    scan = _Scan(stream)
    try:
        scan.load()
    except Exception as error:  # as in `load_tensors`
        raise ValueError(f"its description is damaged ({one_line(error)})") from error
    return scan.claims


class _Inert:
    """Stands for whatever class or function a pickle names; does nothing, whatever is done to it.

    Attributes:
        name: Of the class or function; empty for what was made with it.
    """

    def __init__(self, *_args: object) -> None:
        self.name = ""

    def __call__(self, *_args: object) -> _Inert:
        return _Inert()

    def __setitem__(self, _key: object, _value: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...

    def append(self, _item: object) -> None:
        """As a list's."""

    def extend(self, _items: object) -> None:
        """As a list's."""


# The unpickler written in Python: the other one reserves a table as long as the pickle asks for.
class _Scan(pickle._Unpickler):
    """Walks through a pickle and notes the bytes that each storage claims; runs none of its code.

    Attributes:
        claims: Bytes by the storage's key.
    """

    # Those that torch.save writes. Among the others is one that reserves what it asks for.
    dispatch: ClassVar[dict[int, Any]] = {
        code: function
        for code, function in pickle._Unpickler.dispatch.items()
        if bytes([code]) in _OPCODES
    }

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.claims: dict[str, int] = {}

    def find_class(self, _module: str, name: str) -> _Inert:
        stand_in = _Inert()
        stand_in.name = name
        return stand_in

    def persistent_load(self, pid: Any) -> _Inert:
        if pid[0] == "storage":
            kind, key, _location, numel = pid[1:5]
            item = _STORAGE_BYTES.get(kind.name.removesuffix("Storage"), 0)
            if type(numel) is not int or numel < 0 or type(key) is not str or not item:
                raise ValueError("the description of a storage is damaged")
            self.claims[key] = max(numel * item, self.claims.get(key, 0))
        return _Inert()


def _head(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _size(path: Path) -> int:
    information = path.stat()
    if not stat.S_ISREG(information.st_mode):
        raise CheckpointError(f"{path} is no ordinary file.")
    return information.st_size
