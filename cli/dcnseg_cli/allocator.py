"""A setting of the memory allocator that makes the CPU faster."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1  # malloc.h of glibc
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process reuse large blocks of freed memory; returns whether the C library can.

    By default, glibc returns large freed blocks to the operating system, which clears the pages
    before it hands them out again. With networks on a CPU, that takes 10 to 25 % of the time. The
    peak memory stays the same, but the process holds the memory until it ends.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
