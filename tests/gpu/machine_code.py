"""Write a copy of a CUDA library that contains machine code for no existing GPU.

The machine code of each architecture has a header that names the architecture. Only these names are
changed. This tests what happens where the code for a GPU is missing, without another GPU or nvcc.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

NO_ARCHITECTURE = 999
_CONTAINER = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # magic, version, size of this header
_CONTAINER_SIZE = struct.Struct("<Q")  # of what follows the header
_ENTRY = struct.Struct("<HHIQ")  # kind (1: PTX, 2: machine code), unknown, header and content size
_ARCHITECTURE = struct.Struct("<I")
_ARCHITECTURE_AT = 28  # within the header of an entry


def write_for_no_gpu(library: Path, copy: Path) -> int:
    """Copy a library, replace all its architectures, and return their number."""
    content = bytearray(library.read_bytes())
    positions = list(_architecture_positions(content))
    for position in positions:
        _ARCHITECTURE.pack_into(content, position, NO_ARCHITECTURE)
    copy.write_bytes(content)
    return len(positions)


def read_architectures(library: Path) -> set[int]:
    """Return the architectures of a library, such as 90 for sm_90."""
    content = bytearray(library.read_bytes())
    return {_ARCHITECTURE.unpack_from(content, at)[0] for at in _architecture_positions(content)}


def _architecture_positions(content: bytearray) -> Iterator[int]:
    start = content.find(_CONTAINER)
    while start >= 0:
        position = start + len(_CONTAINER) + _CONTAINER_SIZE.size
        (size,) = _CONTAINER_SIZE.unpack_from(content, start + len(_CONTAINER))
        end = position + size
        while position < end:
            _, _, header, length = _ENTRY.unpack_from(content, position)
            yield position + _ARCHITECTURE_AT
            position += header + length
        start = content.find(_CONTAINER, end)
