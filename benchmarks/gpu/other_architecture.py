"""A copy of a CUDA library that says it was built for no GPU there is.

Entry point: `write_for_no_gpu`. The machine code of each architecture lies in the library's
container with a header that names the architecture; nothing but these names is changed. So a test
can see what happens where the code for a GPU is missing, without another GPU and without nvcc.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

NO_ARCHITECTURE = 999
_CONTAINER = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # magic, version, size of this header
_CONTAINER_SIZE = struct.Struct("<Q")  # of what follows the header, right behind the above
_ENTRY = struct.Struct("<HHIQ")  # kind (1: PTX, 2: machine code), ?, size of header, of content
_ARCHITECTURE = struct.Struct("<I")
_ARCHITECTURE_AT = 28  # within the header of an entry


def write_for_no_gpu(library: Path, copy: Path) -> int:
    """Copy a library, rename all architectures to one that does not exist, and say how many."""
    content = bytearray(library.read_bytes())
    places = list(_architecture_places(content))
    for place in places:
        _ARCHITECTURE.pack_into(content, place, NO_ARCHITECTURE)
    copy.write_bytes(content)
    return len(places)


def architectures(library: Path) -> set[int]:
    """The architectures that a library names, as 90 for sm_90."""
    content = bytearray(library.read_bytes())
    return {_ARCHITECTURE.unpack_from(content, place)[0] for place in _architecture_places(content)}


def _architecture_places(content: bytearray) -> Iterator[int]:
    start = content.find(_CONTAINER)
    while start >= 0:
        place = start + len(_CONTAINER) + _CONTAINER_SIZE.size
        (size,) = _CONTAINER_SIZE.unpack_from(content, start + len(_CONTAINER))
        end = place + size
        while place < end:
            _, _, header, length = _ENTRY.unpack_from(content, place)
            yield place + _ARCHITECTURE_AT
            place += header + length
        start = content.find(_CONTAINER, end)
