"""Wrong values for every place of a nested value, for tests of the readers of files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from dcnseg.errors import DcnsegError

DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]
# What JSON can say, and what numbers in it can be; 1e400 is read as infinity.
JSON_GARBAGE: tuple[Any, ...] = (
    *(None, True, -1, 10**30, 10**4000, 0.5, 1e308, 1e-308, math.nan, math.inf),
    *("", "abc", "a\0b", "x" * 100_000, [], {}, ["a", "b", "c"], [1, 2, 3], {"a": 1}, DEEP),
)

Path = tuple[str | int, ...]


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of a value and of all in it; of long lists only the first and last item's."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index in sorted({0, len(value) - 1} if value else ()):
            yield from places(value[index], (*path, index))


def replaced(value: Any, path: Path, new: Any) -> Any:
    """A copy of a value with something else in one place."""
    if not path:
        return new
    key, *rest = path
    changed = replaced(value[key], tuple(rest), new)
    if isinstance(value, dict):
        return value | {key: changed}
    return type(value)(changed if i == key else item for i, item in enumerate(value))


def removed(value: Any, path: Path) -> Any:
    """A copy of a value without one of its entries or items."""
    key, *rest = path
    if rest:
        return replaced(value, (key,), removed(value[key], tuple(rest)))
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if name != key}
    return type(value)(item for i, item in enumerate(value) if i != key)


def garbled(value: Any, garbage: tuple[Any, ...]) -> Iterator[tuple[Path, Any]]:
    """Each place of a value replaced by each wrong value, or taken away."""
    for path in places(value):
        for wrong in garbage:
            yield path, replaced(value, path, wrong)
        if path:
            yield path, removed(value, path)


def refusal(read: Callable[[], object]) -> str:
    """What dcnseg says of something that it does not read; nothing if it does."""
    try:
        read()
    except DcnsegError as error:
        return str(error)
    return ""
