"""Selection of the device and the number format, and free memory.

Entry points: `select_device`, `select_amp_dtype`, `explain_out_of_memory` and `free_memory`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dcnseg.config import AMP_MODES, DEVICES
from dcnseg.errors import ConfigError, DcnsegError
from dcnseg.validation import did_you_mean

CGROUP = Path("/sys/fs/cgroup")
# Out-of-memory errors of torch's CPU allocator, oneDNN and C++.
_CPU_MESSAGES = (
    "not enough memory",
    "DefaultCPUAllocator",
    "could not create a memory object",
    "bad_alloc",
)


def select_device(name: str) -> torch.device:
    """Return the device for `--device`; "auto" prefers CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: The name is unknown or the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        hint = did_you_mean(name, DEVICES)
        raise ConfigError(
            f"--device is {name!r}; expected one of {', '.join(DEVICES)}, or cuda:N.{hint}"
        )
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if device.type in count and (device.index or 0) >= count[device.type]:
        raise ConfigError(
            f"--device is {name}, but PyTorch finds {count[device.type]} {device.type} devices. "
            "Use --device cpu, or install a PyTorch build that supports this machine."
        )
    return device


def select_amp_dtype(mode: str, device: torch.device) -> torch.dtype | None:
    """Return the lower-precision dtype for `--amp`; None means float32.

    "auto" selects bfloat16 where it is faster than float32, and float16 on older GPUs.

    Raises:
        ConfigError: The mode is unknown, or "fp16" on the CPU.
    """
    if mode not in AMP_MODES:
        hint = did_you_mean(mode, AMP_MODES)
        raise ConfigError(f"--amp is {mode!r}; expected one of {', '.join(AMP_MODES)}.{hint}")
    if mode == "off":
        return None
    if mode == "bf16":
        return torch.bfloat16
    if mode == "fp16":
        if device.type == "cpu":
            raise ConfigError("--amp fp16 requires a GPU; use --amp bf16 or --amp off on a CPU.")
        return torch.float16
    if device.type == "cuda":
        # Older GPUs emulate bfloat16, which is slower than float32.
        has_bfloat16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu" and has_cpu_bfloat16():
        return torch.bfloat16
    return None


def has_cpu_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions (AVX512_BF16 or AMX)."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch >= 2.12
    if get_capabilities is None:
        return False
    capabilities = get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is an out-of-memory error of torch, oneDNN, C++ or Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MESSAGES)


@contextmanager
def explain_out_of_memory(make_error: Callable[[], DcnsegError]) -> Iterator[None]:
    """Replace an out-of-memory error by `make_error()`, and free torch's cached GPU memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        raise make_error() from error


def free_memory() -> float:
    """Return the bytes that this process can still allocate, within the limit of its container."""
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = 1024.0 * int(lines["MemAvailable"].split()[0])
    limit = CGROUP / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0))  # page cache, which the kernel frees on demand
        free = min(free, float(limit.read_text()) - used + cached)
    return free
