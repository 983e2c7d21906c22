"""The errors that dcnseg raises on purpose; the command line prints each as one line.

A message says what is wrong with which argument or file, what was expected, what came, and what to
do.
"""

from __future__ import annotations

from typing import Any


def short_repr(value: Any, limit: int = 80) -> str:
    """Return `repr(value)` for a message, cut off after `limit` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits, a list nested too deep
        return f"a value of the type {type(value).__name__}, too long to print"
    return text if len(text) <= limit else f"{text[:limit]}..."


class DcnsegError(Exception):
    """Base of every error that a user can mend; anything else is a fault in dcnseg."""


class ConfigError(DcnsegError):
    """A setting is out of its range or contradicts another one."""


class DataError(DcnsegError):
    """A picture, mask, class list or data folder is wrong; the message names the file."""


class CheckpointError(DcnsegError):
    """A weights file or checkpoint cannot be read, or does not fit the model."""


class NotFiniteError(DcnsegError):
    """The network's output has NaN or infinity: its weights are damaged or training diverged."""


class ShapeError(DcnsegError, ValueError):
    """The shape, dtype or device of a tensor disagrees with the others; the message gives both."""


class NativeOpsError(DcnsegError):
    """The native operators were asked for by name and cannot serve the call."""


class TrainingError(DcnsegError):
    """Training cannot go on, for instance because the loss is not finite."""


class TrainingStoppedError(DcnsegError):
    """Training was asked to stop and has saved its state."""
