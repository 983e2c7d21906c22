"""One entry of a class list: `ClassInfo`, its checks and its JSON form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from dcnseg.data.label_codes import MAX_ID, Color, distinct_colors
from dcnseg.errors import ConfigError, short_repr


@dataclass(frozen=True)
class ClassInfo:
    """One entry of the class list; `is_color_given` is false for a generated color."""

    id: int
    name: str
    color: Color
    is_color_given: bool = True


def check_entry(entry: ClassInfo, source: str) -> None:
    """Raise ConfigError for an invalid id, name or color; `source` names the list in messages."""
    if not 0 <= entry.id <= MAX_ID:
        raise ConfigError(
            f"{source}: the id {short_repr(entry.id)} of {short_repr(entry.name)} is not in "
            f"0..{MAX_ID}."
        )
    if not is_class_name(entry.name):
        raise ConfigError(f"{source}: the entry with id {entry.id} needs a name on one line.")
    if any("\ud800" <= character <= "\udfff" for character in entry.name):
        raise ConfigError(
            f"{source}: the name {short_repr(entry.name)} contains an unpaired surrogate, which "
            "UTF-8 cannot encode."
        )
    if len(entry.color) != 3 or not all(0 <= value <= 255 for value in entry.color):
        raise ConfigError(
            f"{source}: the color {short_repr(entry.color)} of {short_repr(entry.name)} must be "
            "three integers in 0..255."
        )


def is_class_name(value: Any) -> TypeGuard[str]:
    """Whether a value is a non-blank string on one line."""
    return isinstance(value, str) and bool(value.strip()) and len(value.splitlines()) == 1


def parse_entry(entry: Any, source: str) -> tuple[int, str, Color | None]:
    """Parse {"id", "name", "color"} with optional `color`; raise ConfigError if invalid."""
    if not isinstance(entry, dict):
        raise ConfigError(
            f'{source}: an entry is {short_repr(entry)}; expected {{"id": 0, "name": "..."}}.'
        )
    number, name, color = entry.get("id"), entry.get("name"), entry.get("color")
    if not _is_int(number) or not isinstance(name, str):
        raise ConfigError(
            f"{source}: the entry {short_repr(entry)} needs an integer `id` and a string `name`."
        )
    if color is None:
        return number, name, None
    if not isinstance(color, list) or len(color) != 3 or not all(map(_is_int, color)):
        raise ConfigError(
            f"{source}: the color {short_repr(color)} of {short_repr(name)} must be three numbers "
            "0..255."
        )
    return number, name, (color[0], color[1], color[2])


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def with_colors(entries: Sequence[tuple[int, str, Color | None]]) -> tuple[ClassInfo, ...]:
    """Generate the missing colors; the same list always gets the same colors."""
    taken = [color for _, _, color in entries if color is not None]
    generated = iter(distinct_colors(len(entries) - len(taken), taken))
    return tuple(
        ClassInfo(number, name, color or next(generated), is_color_given=color is not None)
        for number, name, color in entries
    )


def entry_dict(entry: ClassInfo) -> dict[str, Any]:
    """Return the form that `parse_entry` reads, without a generated color."""
    content: dict[str, Any] = {"id": entry.id, "name": entry.name}
    if entry.is_color_given:
        content["color"] = list(entry.color)
    return content
