"""Validation of values from options and files: types, ranges, JSON values; imports no torch.

Entry points: `check_fields`, `parse_fields`, `require_between`, `require_json_value`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from dcnseg.errors import ConfigError, short_repr

Kind = TypeVar("Kind")

MAX_JSON_DEPTH: Final = 8
_TYPE_NAMES: Final = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_LABELS: Final = {"root": "DATA", "mean": "mean", "std": "std"}  # fields without an option

# Names of fields in files of earlier versions.
_RENAMED: Final = {"colour_jitter": "color_jitter", "grey_share": "gray_share"}

_known_hints: dict[type, dict[str, Any]] = {}


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Return " Did you mean x?" with the closest choice, or "" if none is close."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(value.lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[close[0]]}?" if close else ""


def require(condition: bool, message: str) -> None:
    """Raise a ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_between(name: str, value: float, least: float, most: float) -> None:
    """Raise a ConfigError unless least <= value <= most."""
    require(
        least <= value <= most,
        f"{name} is {short_repr(value)}; expected at least {least} and at most {most}.",
    )


def check_fields(config: Any) -> None:
    """Check the types of a dataclass's fields.

    Strings and paths must not contain a null byte, which no file name can have.

    Raises:
        ConfigError: A field has a value of a wrong type; the message names the first one.
    """
    for name, hint in _hints(type(config)).items():
        _check_field(name, hint, getattr(config, name))


def parse_fields(kind: type[Kind], values: Any) -> Kind:
    """Build a dataclass from a JSON object, or from the output of `dataclasses.asdict`.

    Raises:
        ConfigError: A field is unknown, missing or of a wrong type, or the class rejects a value.
    """
    label = _label(kind)
    require(
        isinstance(values, Mapping),
        f"expected a JSON object for {label}, found {short_repr(values)}.",
    )
    hints = _hints(kind)
    values = {
        key if key in hints else _RENAMED.get(key, key): value for key, value in values.items()
    }
    unknown = ", ".join([short_repr(key) for key in values if key not in hints][:5])
    require(
        not unknown,
        f"unknown field {unknown} in {label}; was the file written by a newer dcnseg?",
    )
    required = [
        item.name
        for item in fields(kind)  # type: ignore[arg-type]
        if item.default is MISSING and item.default_factory is MISSING
    ]
    missing = [key for key in required if key not in values]
    require(not missing, f"missing field {', '.join(map(repr, missing))} in {label}.")
    parsed = {key: _parse(hints[key], value) for key, value in values.items()}
    for key, value in parsed.items():
        _check_field(key, hints[key], value)
    return kind(**parsed)


def require_json_value(value: Any, name: str) -> None:
    """Raise a ConfigError unless a value is a string, a finite number, or a container of those."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        require(
            depth <= MAX_JSON_DEPTH, f"{name} is nested more than {MAX_JSON_DEPTH} levels deep."
        )
        if isinstance(item, Mapping):
            wrong = [key for key in item if not isinstance(key, str)]
            require(not wrong, f"{name} has the key {short_repr(wrong[:1])}; expected a string.")
            pending.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list | tuple):
            pending.extend((child, depth + 1) for child in item)
        else:
            require(
                item is None or isinstance(item, str | bool) or _is_finite(item),
                f"{name} has {short_repr(item)}; expected a string or a finite number.",
            )


def _is_finite(value: Any) -> bool:
    if isinstance(value, int):
        return value.bit_length() < 64
    return isinstance(value, float) and math.isfinite(value)


def _hints(kind: type) -> dict[str, Any]:
    if kind not in _known_hints:  # slower than all the checks
        _known_hints[kind] = get_type_hints(kind)
    return _known_hints[kind]


def _label(kind: type) -> str:
    """Name a dataclass in a message: "the model settings" for ModelConfig."""
    words = re.sub("(?<!^)([A-Z])", r" \1", kind.__name__).lower()
    return "the " + words.replace("train config", "training config").replace("config", "settings")


def _check_field(name: str, hint: Any, value: Any) -> None:
    label = _LABELS.get(name, f"--{name.replace('_', '-')}")
    require(
        _matches(hint, value), f"{label} is {short_repr(value)}; expected {_describe_type(hint)}."
    )


def _matches(hint: Any, value: Any) -> bool:
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_matches(choice, value) for choice in arguments)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(hints) and all(map(_matches, hints, value))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, hint) and "\0" not in str(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(hint) or hint)


def _describe_type(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe_type(choice) for choice in arguments)
    if get_origin(hint) is tuple:
        items = f"{_describe_type(arguments[0]).removeprefix('an ').removeprefix('a ')}s"
        return f"a list of {items}" if arguments[-1] is Ellipsis else f"{len(arguments)} {items}"
    if hint is NoneType:
        return "none"
    return _TYPE_NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}".lower())


def _parse(hint: Any, value: Any) -> Any:
    """Convert a JSON value to the type of a field if it has the right form, else return it."""
    if is_dataclass(hint) and isinstance(hint, type):
        return parse_fields(hint, value)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if get_origin(hint) is tuple and isinstance(value, int | float):
        return (value,)
    is_path = hint is Path or Path in get_args(hint)
    return Path(value) if is_path and isinstance(value, str) else value
