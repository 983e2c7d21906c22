"""The errors that dcnseg raises on purpose; the command line prints each as one line.

A message says what is wrong with which argument or file, what was expected, what came, and what to
do.
"""

from __future__ import annotations

import reprlib
from typing import Any, Final

MAX_SHOWN_BITS: Final = 400  # of an integer; Python refuses to print one of 5000 digits

_representation = reprlib.Repr()
_representation.maxstring = _representation.maxother = 80
_representation.maxlong = 130


def short_repr(value: Any) -> str:
    """Return `repr(value)` for a message, shortened, however large or deep the value is."""
    if isinstance(value, int) and value.bit_length() > MAX_SHOWN_BITS:
        return f"a number of {value.bit_length()} bits"
    return _representation.repr(value)


class DcnsegError(Exception):
    """Base of every error that a user can fix; anything else is a fault in dcnseg."""


class ConfigError(DcnsegError):
    """A setting is out of its range or contradicts another one."""


class DataError(DcnsegError):
    """An image, mask, class list or data folder is wrong; the message names the file."""


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
