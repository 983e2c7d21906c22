"""Training curves for TensorBoard, where that package is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dcnseg.errors import ConfigError


@contextmanager
def open_event_writer(folder: Path | None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes an epoch's numbers; it does nothing when `folder` is None.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """
    if folder is None:
        yield lambda record: None
        return
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:

        def write(record: Mapping[str, Any]) -> None:
            for name, value in _flatten(record):
                writer.add_scalar(name, value, record["epoch"])

        yield write


def require_tensorboard() -> None:
    """Raise a ConfigError where the package tensorboard is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard needs the package tensorboard: pip install tensorboard")


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value
