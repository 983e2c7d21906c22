"""Reading the files of `torch.save` without torch's reader; entry point `read_torch_file`.

What a file claims to hold is compared with its size before anything of that size is reserved.
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

# A description takes 100 to 200 bytes per tensor, so this is enough for 20 000 of them.
MAX_DESCRIPTION_BYTES: Final = 4 * 2**20
ZIP_START: Final = b"PK\x03\x04"
LEGACY_STARTS: Final = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))

_LEGACY_MAGIC: Final = (0x1950A86A20F9469CFC6C, 1001)  # torch.serialization's, and its version
_CHUNK_BYTES: Final = 2**20
_DIRECTORY_SIZE: Final = 5  # place of the directory's size in what zipfile knows of an archive


def read_torch_file(file: IO[bytes], size: int) -> Any:
    """Read what `torch.save` wrote, as a zip archive or in the form from before torch 1.6.

    Args:
        file: The open file, at its beginning.
        size: Its bytes.

    Returns:
        Tensors on the CPU, numbers, text, and lists, tuples and dictionaries of them.

    Raises:
        ValueError: The file is damaged, or claims or holds what it may not.
    """
    is_zip = file.read(len(ZIP_START)) == ZIP_START
    file.seek(0)
    return _read_zip(file, size) if is_zip else _read_legacy(file, size)


def _read_zip(file: IO[bytes], size: int) -> Any:
    try:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        if end and end[_DIRECTORY_SIZE] > MAX_DESCRIPTION_BYTES:
            raise ValueError(
                f"its directory has {end[_DIRECTORY_SIZE]} bytes; expected at most "
                f"{MAX_DESCRIPTION_BYTES}"
            )
        with zipfile.ZipFile(file) as archive:
            root = _checked_root(archive, size)
            if _read_small(archive, f"{root}/byteorder", sys.byteorder.encode()) != (
                sys.byteorder.encode()
            ):
                raise ValueError("it was written by a machine of another byte order")
            description = io.BytesIO(archive.read(f"{root}/data.pkl"))
            return read_pickle(
                description,
                lambda key, dtype, numel: _read_storage(archive, root, key, dtype, numel),
            )
    except zipfile.BadZipFile as error:
        raise ValueError(f"its zip archive is damaged ({error})") from error


def _checked_root(archive: zipfile.ZipFile, size: int) -> str:
    """The folder that all entries lie in; none of them is compressed or read twice."""
    entries = archive.infolist()
    claimed = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or claimed > size:
        raise ValueError(
            f"its {len(entries)} entries claim {claimed} bytes in a file of {size}, {packed} of "
            "them compressed; torch.save compresses none"
        )
    sizes = {entry.filename: entry.file_size for entry in entries}
    root, *others = {name.partition("/")[0] for name in sizes} or {""}
    description = sizes.get(f"{root}/data.pkl")
    if others or len(sizes) != len(entries) or description is None:
        raise ValueError("it is a zip archive, but not one of torch.save")
    if description > MAX_DESCRIPTION_BYTES:
        raise ValueError(
            f"its description has {description} bytes; expected at most {MAX_DESCRIPTION_BYTES}"
        )
    return root


def _read_small(archive: zipfile.ZipFile, name: str, default: bytes) -> bytes:
    if name not in archive.namelist():
        return default
    with archive.open(name) as part:
        return part.read(16)


def _read_storage(
    archive: zipfile.ZipFile, root: str, key: str, dtype: torch.dtype, numel: int
) -> Tensor:
    name = f"{root}/data/{key}"
    there = archive.getinfo(name).file_size if name in archive.NameToInfo else 0
    if numel * dtype.itemsize != there:
        raise ValueError(
            f"its storage {key} claims {numel * dtype.itemsize} bytes, but has {there}"
        )
    values = torch.empty(numel, dtype=dtype)
    if there:
        try:
            with archive.open(name) as part:
                _fill(values, iter(lambda: part.read(_CHUNK_BYTES), b""))
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"its part {name} does not have the checksum it had; the file is damaged"
            ) from error
    return values


def _fill(values: Tensor, chunks: Iterator[bytes]) -> None:
    """Copy the bytes of all chunks, which have to be as many, into a tensor."""
    target = memoryview(values.view(torch.uint8).numpy().data)
    start = 0
    for chunk in chunks:
        target[start : start + len(chunk)] = chunk
        start += len(chunk)
    if start != len(target):
        raise ValueError(f"a storage has {start} bytes instead of {len(target)}; it is cut off")


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """Read three short pickles, that of the content, the storages' keys, then the storages."""
    descriptions = io.BytesIO(file.read(MAX_DESCRIPTION_BYTES))
    preamble = [read_pickle(descriptions) for _ in range(3)]  # the last one tells of the machine
    if tuple(preamble[:2]) != _LEGACY_MAGIC:
        raise ValueError("it is a pickle, but not one of torch.save")
    storages: dict[str, Tensor] = {}
    left = size

    def make_storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        nonlocal left
        left -= numel * dtype.itemsize
        if left < 0:
            raise ValueError(f"its storages claim {size - left} bytes in a file of {size}")
        storages[key] = torch.empty(numel, dtype=dtype)
        return storages[key]

    content = read_pickle(descriptions, make_storage)
    keys = read_pickle(descriptions)
    if type(keys) is not list or keys != list(dict.fromkeys(keys)) or set(keys) != set(storages):
        raise ValueError("its list of storages is damaged")
    file.seek(descriptions.tell())
    for key in keys:
        _read_legacy_storage(file, storages[key])
    return content


def _read_legacy_storage(file: IO[bytes], values: Tensor) -> None:
    numel = int.from_bytes(file.read(8), "little")
    if numel != len(values):
        raise ValueError(f"a storage has {numel} elements instead of {len(values)}")
    if numel:
        _fill(values, iter([file.read(values.nbytes)]))
