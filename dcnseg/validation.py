"""Checks of values from options and files: types, ranges, plain JSON; imports no torch.

Entry points: `check_fields`, `parse_fields`, `require_between`, `require_plain`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from dcnseg.errors import ConfigError, short_repr

Kind = TypeVar("Kind")

MAX_PLAIN_DEPTH: Final = 8
_EXPECTED: Final = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_LABELS: Final = {"root": "DATA", "mean": "mean", "std": "std"}  # settings that are no options

# Fields by their names in files of earlier versions.
_RENAMED: Final = {"colour_jitter": "color_jitter", "grey_share": "gray_share"}

_known_hints: dict[type, dict[str, Any]] = {}


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """The closest choice as the end of a message, ' Did you mean x?'; empty if none is close."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(value.lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[close[0]]}?" if close else ""


def require(condition: bool, message: str) -> None:
    """Raise a ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_between(name: str, value: float, least: float, most: float) -> None:
    """Raise a ConfigError unless a number is in a range, both ends included."""
    require(
        least <= value <= most,
        f"{name} is {short_repr(value)}; expected at least {least} and at most {most}.",
    )


def check_fields(config: Any) -> None:
    """Raise a ConfigError that names the first field of a dataclass whose value is of a wrong type.

    Text and paths must not have a zero byte, which no file name can have.
    """
    for name, hint in _hints(type(config)).items():
        _check_field(name, hint, getattr(config, name))


def parse_fields(kind: type[Kind], values: Any) -> Kind:
    """Make a dataclass from a JSON object, or from the tuples and dictionaries of `asdict`.

    Raises:
        ConfigError: A field is unknown, missing, or of a wrong type; what the class itself raises.
    """
    name = kind.__name__
    require(isinstance(values, Mapping), f"{name} is {short_repr(values)}; expected a JSON object.")
    hints = _hints(kind)
    values = {
        key if key in hints else _RENAMED.get(key, key): value for key, value in values.items()
    }
    unknown = [key for key in values if key not in hints]
    require(
        not unknown,
        f"{name} does not know {', '.join(map(_plain_name, unknown[:5]))}; was it written by a "
        "newer dcnseg?",
    )
    required = [
        item.name
        for item in fields(kind)  # type: ignore[arg-type]
        if item.default is MISSING and item.default_factory is MISSING
    ]
    missing = [key for key in required if key not in values]
    require(not missing, f"{name} lacks {', '.join(missing)}.")
    parsed = {key: _parse(hints[key], value) for key, value in values.items()}
    for key, value in parsed.items():
        _check_field(key, hints[key], value)
    return kind(**parsed)


def require_plain(value: Any, name: str) -> None:
    """Raise a ConfigError unless a value is text, a finite number, or a JSON container of those."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        require(depth <= MAX_PLAIN_DEPTH, f"{name} is nested more than {MAX_PLAIN_DEPTH} deep.")
        if isinstance(item, Mapping):
            wrong = [key for key in item if not isinstance(key, str)]
            require(not wrong, f"{name} has the key {short_repr(wrong[:1])}; expected text.")
            pending.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list | tuple):
            pending.extend((child, depth + 1) for child in item)
        else:
            is_plain = item is None or isinstance(item, str | bool) or _is_finite(item)
            require(is_plain, f"{name} has {short_repr(item)}; expected text or a finite number.")


def _is_finite(value: Any) -> bool:
    if isinstance(value, int):
        return value.bit_length() < 64
    return isinstance(value, float) and math.isfinite(value)


def _hints(kind: type) -> dict[str, Any]:
    if kind not in _known_hints:  # making them takes longer than all the checks
        _known_hints[kind] = get_type_hints(kind)
    return _known_hints[kind]


def _plain_name(key: Any) -> str:
    return key if isinstance(key, str) and len(key) < 80 else short_repr(key)


def _check_field(name: str, hint: Any, value: Any) -> None:
    label = _LABELS.get(name, f"--{name.replace('_', '-')}")
    require(_matches(hint, value), f"{label} is {short_repr(value)}; expected {_expected(hint)}.")


def _matches(hint: Any, value: Any) -> bool:
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_matches(choice, value) for choice in arguments)
    if get_origin(hint) is tuple:
        hints = arguments[:1] * len(value) if _is_open(hint) and _is_tuple(value) else arguments
        return _is_tuple(value) and len(value) == len(hints) and all(map(_matches, hints, value))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, hint) and "\0" not in str(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple)


def _is_open(hint: Any) -> bool:
    """Whether a tuple may have any number of items."""
    return get_args(hint)[-1] is Ellipsis


def _expected(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_expected(choice) for choice in arguments)
    if get_origin(hint) is tuple:
        what = _expected(arguments[0]).removeprefix("a ")
        return f"a list of {what}s" if _is_open(hint) else f"{len(arguments)} {what}s"
    if hint is NoneType:
        return "nothing"
    return _EXPECTED.get(hint, f"a {getattr(hint, '__name__', hint)}".lower())


def _parse(hint: Any, value: Any) -> Any:
    """A JSON value as the type that a field has, where there is one; else the value itself."""
    if is_dataclass(hint) and isinstance(hint, type):
        return parse_fields(hint, value)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if get_origin(hint) is tuple and isinstance(value, int | float):
        return (value,)
    is_path = hint is Path or Path in get_args(hint)
    return Path(value) if is_path and isinstance(value, str) else value
