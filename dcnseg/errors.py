"""The exceptions that dcnseg raises on purpose; the command line prints each on one line.

A message says what is wrong with which argument or file, what was expected, what was found, and
what to do.
"""

from __future__ import annotations

import reprlib
from typing import Any, Final

MAX_SHOWN_BITS: Final = 400  # Python refuses to print an integer of more than 4300 digits

_representation = reprlib.Repr()
_representation.maxstring = _representation.maxother = 80
_representation.maxlong = 130


def short_repr(value: Any) -> str:
    """Return a shortened `repr(value)` for a message, however large or deeply nested `value` is."""
    if isinstance(value, int) and value.bit_length() > MAX_SHOWN_BITS:
        return f"a number of {value.bit_length()} bits"
    return _representation.repr(value)


class DcnsegError(Exception):
    """Base of every error that a user can fix; any other exception is a bug in dcnseg."""


class ConfigError(DcnsegError):
    """A setting is out of range or contradicts another one."""


class DataError(DcnsegError):
    """An image, mask, class list or data folder is invalid; the message names the file."""


class CheckpointError(DcnsegError):
    """A weights file or checkpoint cannot be read, or does not fit the model."""


class NotFiniteError(DcnsegError):
    """The network's output has NaN or infinity: its weights are damaged or training diverged."""


class ShapeError(DcnsegError, ValueError):
    """A tensor's shape, dtype or device does not match the others; the message gives both."""


class NativeOpsError(DcnsegError):
    """The native operators were requested explicitly and do not support the call."""


class ExportError(DcnsegError):
    """A network cannot be exported, or the exported model gives other results."""


class TrainingError(DcnsegError):
    """Training cannot continue, for instance because the loss is not finite."""


class TrainingStoppedError(DcnsegError):
    """Training was stopped on request, after saving a checkpoint."""


class OtherProcessError(DcnsegError):
    """Another process of the same run has failed, and reports why."""
