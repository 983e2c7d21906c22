"""Failures to read a text file as errors that name it: `explain_unreadable`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcnseg.errors import DataError


@contextmanager
def explain_unreadable(path: Path, expected: str) -> Iterator[None]:
    """Convert OSError and ValueError into a DataError; `expected` is the kind of file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise DataError(f"{path}: is not {expected} ({error}).") from error
