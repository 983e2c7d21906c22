"""Import of packages that only exported models need; entry point `import_package`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from dcnseg.errors import ConfigError

# The extra of dcnseg that installs a package.
_EXTRAS: Final[Mapping[str, str]] = {
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
}


def import_package(name: str) -> Any:
    """Import a package, or raise a ConfigError with the command that installs it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f"the package {name} is not installed. Install it with: "
            f'pip install "dcnseg[{_EXTRAS[name]}]"'
        ) from error
