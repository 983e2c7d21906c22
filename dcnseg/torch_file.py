"""Safe reader of `torch.save` files; entry point `read_torch_file`.

Declared sizes are compared with the file size before anything is allocated.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator
from typing import IO, Any, Final

import torch
from torch import Tensor

from dcnseg.tensor_pickle import read_pickle

# A pickle or header takes 100 to 200 bytes per tensor, so this is enough for 20,000 tensors.
MAX_HEADER_BYTES: Final = 4 * 2**20
ZIP_START: Final = b"PK\x03\x04"
LEGACY_STARTS: Final = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))

_LEGACY_MAGIC: Final = (0x1950A86A20F9469CFC6C, 1001)  # number and version of torch.serialization
_CHUNK_BYTES: Final = 2**20
_DIRECTORY_SIZE: Final = 5  # index of the directory's size in zipfile's record


def read_torch_file(file: IO[bytes], size: int) -> Any:
    """Read a `torch.save` file: a zip archive, or the legacy format of torch < 1.6.

    The file must be open at position 0; it has `size` bytes.

    Returns:
        Tensors on the CPU, numbers, strings, None, and lists, tuples and dictionaries of them.

    Raises:
        ValueError: The file is damaged, has values of other types, or declares more data than it
            has.
    """
    is_zip = file.read(len(ZIP_START)) == ZIP_START
    file.seek(0)
    return _read_zip(file, size) if is_zip else _read_legacy(file, size)


def _read_zip(file: IO[bytes], size: int) -> Any:
    try:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end and end[_DIRECTORY_SIZE] > MAX_HEADER_BYTES:
            raise ValueError(
                f"its zip directory has {end[_DIRECTORY_SIZE]} bytes; expected at most "
                f"{MAX_HEADER_BYTES}"
            )
        with zipfile.ZipFile(file) as archive:
            root = _check_archive(archive, size)
            _check_byte_order(archive, f"{root}/byteorder")
            return read_pickle(
                io.BytesIO(archive.read(f"{root}/data.pkl")),
                lambda key, dtype, numel: _read_storage(archive, root, key, dtype, numel),
            )
    except zipfile.BadZipFile as error:
        raise ValueError(f"the zip archive is damaged ({error})") from error


def _check_archive(archive: zipfile.ZipFile, size: int) -> str:
    """Return the folder of all entries; refuse compressed, repeated and oversized entries."""
    entries = archive.infolist()
    declared = sum(entry.file_size for entry in entries)
    num_compressed = sum(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if num_compressed or declared > size:
        raise ValueError(
            f"its {len(entries)} entries declare {declared} bytes in a file of {size} bytes, and "
            f"{num_compressed} are compressed; torch.save does not compress entries"
        )
    sizes = {entry.filename: entry.file_size for entry in entries}
    root, *others = {name.partition("/")[0] for name in sizes} or {""}
    pickle_size = sizes.get(f"{root}/data.pkl")
    if others or len(sizes) != len(entries) or pickle_size is None:
        raise ValueError("it is a zip archive, but not one of torch.save")
    if pickle_size > MAX_HEADER_BYTES:
        raise ValueError(f"its pickle has {pickle_size} bytes; expected at most {MAX_HEADER_BYTES}")
    return root


def _check_byte_order(archive: zipfile.ZipFile, name: str) -> None:
    if name in archive.namelist():  # not in files of older versions of torch
        with archive.open(name) as part:
            if part.read(16) != sys.byteorder.encode():
                raise ValueError("it was written on a machine with another byte order")


def _read_storage(
    archive: zipfile.ZipFile, root: str, key: str, dtype: torch.dtype, numel: int
) -> Tensor:
    name = f"{root}/data/{key}"
    size = archive.getinfo(name).file_size if name in archive.NameToInfo else 0
    if numel * dtype.itemsize != size:
        raise ValueError(
            f"its storage {key} declares {numel * dtype.itemsize} bytes but has {size}"
        )
    values = torch.empty(numel, dtype=dtype)
    if size:
        try:
            with archive.open(name) as part:
                _fill(values, iter(lambda: part.read(_CHUNK_BYTES), b""))
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"the checksum of its entry {name} does not match; the file is damaged"
            ) from error
    return values


def _fill(values: Tensor, chunks: Iterator[bytes]) -> None:
    """Copy chunks of bytes into a tensor; their total size must match."""
    target = memoryview(values.view(torch.uint8).numpy().data)
    start = 0
    for chunk in chunks:
        target[start : start + len(chunk)] = chunk
        start += len(chunk)
    if start != len(target):
        raise ValueError(f"a storage has {start} bytes instead of {len(target)}; it is truncated")


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """Read three header pickles, the content, the storage keys, and then the storages."""
    pickles = io.BytesIO(file.read(MAX_HEADER_BYTES))
    preamble = [read_pickle(pickles) for _ in range(3)]  # magic number, version, system
    if tuple(preamble[:2]) != _LEGACY_MAGIC:
        raise ValueError("it is a pickle, but not one of torch.save")
    storages: dict[str, Tensor] = {}
    left = size

    def make_storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        nonlocal left
        left -= numel * dtype.itemsize
        if left < 0:
            raise ValueError(f"its storages declare {size - left} bytes in a file of {size} bytes")
        storages[key] = torch.empty(numel, dtype=dtype)
        return storages[key]

    content = read_pickle(pickles, make_storage)
    keys = read_pickle(pickles)
    if type(keys) is not list or keys != list(dict.fromkeys(keys)) or set(keys) != set(storages):
        raise ValueError("its list of storages is damaged")
    file.seek(pickles.tell())
    for key in keys:
        _read_legacy_storage(file, storages[key])
    return content


def _read_legacy_storage(file: IO[bytes], values: Tensor) -> None:
    numel = int.from_bytes(file.read(8), "little")
    if numel != len(values):
        raise ValueError(f"a storage has {numel} elements instead of {len(values)}")
    if numel:
        _fill(values, iter([file.read(values.nbytes)]))
