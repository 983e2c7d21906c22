"""Loading of the native libraries, which happens once, when this module is imported.

Entry points: `native_status` and `missing_reason`.
"""

from __future__ import annotations

import ctypes
import os
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

import torch

_LOADED: Final = "loaded"


def native_status() -> dict[str, str]:
    """Report which native libraries are loaded.

    Returns:
        A dictionary with the keys "build" (the compilers, as JSON), "cpu" and "cuda". The last two
        are "loaded" or the reason why the library is not available.
    """
    return dict(_STATUS)


def missing_reason(device_type: str) -> str | None:
    """Return why native operators are not available for a device type, or None if they are."""
    state = _STATUS.get(device_type, "dcnseg has no native operators for this device type")
    return None if state == _LOADED else state


def _directory() -> Traversable:
    override = os.environ.get("DCNSEG_NATIVE_DIR")  # a CMake build folder, for development
    return Path(override) if override else resources.files("dcnseg") / "_native"


def _missing_file_reason(file_name: str) -> str:
    """Distinguish a library that was not built from one in another copy of the package."""
    try:
        installed = Path(
            str(metadata.distribution("dcnseg").locate_file(f"dcnseg/_native/{file_name}"))
        )
    except metadata.PackageNotFoundError:
        return "not built: dcnseg is not installed, only imported from its source folder"
    if installed.is_file():
        here = Path(__file__).parents[1]
        return (
            f"the source folder {here} shadows the installed package {installed.parents[1]}; "
            "start Python in another folder, or install with `pip install --editable .`"
        )
    return "not built"


def _load(path: Path) -> str:
    """Load a library and register its operators. Returns "loaded" or the reason for the failure."""
    try:
        register = ctypes.CDLL(str(path)).dcnseg_register
    except (OSError, AttributeError) as error:  # torch too old, or not our library
        return f"failed to load: {error}"
    register.restype = ctypes.c_char_p
    message: bytes | None = register()
    return _LOADED if message is None else f"failed to register: {message.decode()}"


def _load_all() -> dict[str, str]:
    if os.environ.get("DCNSEG_NATIVE", "1") == "0":
        disabled = "native operators are disabled by DCNSEG_NATIVE=0"
        return {"build": _build_info(), "cpu": disabled, "cuda": disabled}
    status = {"build": _build_info()}
    for device_type in ("cpu", "cuda"):
        file_name = f"libdcnseg_{device_type}.so"
        path = Path(str(_directory() / file_name))
        if not path.is_file():
            status[device_type] = _missing_file_reason(file_name)
        elif device_type == "cuda" and torch.version.cuda is None:
            status[device_type] = "not loaded: this build of torch does not support CUDA"
        elif device_type == "cuda" and status["cpu"] != _LOADED:  # which defines the schemas
            status[device_type] = "not loaded: the CPU library, which it requires, is not available"
        else:
            status[device_type] = _load(path)
    return status


def _build_info() -> str:
    file = _directory() / "build_info.json"
    return file.read_text().strip() if file.is_file() else "installed without native operators"


_STATUS: Final = _load_all()
