from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dcnseg.errors import ConfigError, short_repr
from dcnseg.validation import check_fields, parse_fields, require_json_value


@dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclass(frozen=True)
class Outer:
    place: Path
    rate: float = 0.5
    name: str = "x"
    is_on: bool = False
    sides: tuple[int, ...] = ()
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    maybe: Path | None = None
    inner: Inner = field(default_factory=Inner)


def test_parse_fields_converts_json_values() -> None:
    values = {"place": "a", "rate": 1, "sides": [1, 2], "mean": (1, 2, 3), "maybe": "b"}
    outer = parse_fields(Outer, values | {"inner": {"size": 4}})
    expected = Outer(Path("a"), 1, sides=(1, 2), mean=(1, 2, 3), maybe=Path("b"), inner=Inner(4))
    assert outer == expected
    check_fields(outer)
    assert parse_fields(Outer, {"place": "a", "maybe": None}) == Outer(Path("a"))
    assert parse_fields(Outer, {"place": "a", "sides": 3}).sides == (3,)
    with pytest.raises(ConfigError, match="missing field 'place' in the outer"):
        parse_fields(Outer, {})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"place": 3}, "--place is 3; expected a path."),
        ({"place": "a\0"}, r"--place is .*; expected a path\."),
        ({"rate": "0.5"}, "--rate is '0.5'; expected a number."),
        ({"rate": True}, "--rate is True; expected a number."),
        ({"name": None}, "--name is None; expected a string."),
        ({"name": "a\0"}, r"--name is 'a\\x00'; expected a string."),
        ({"is_on": 1}, "--is-on is 1; expected true or false."),
        ({"sides": [1.5]}, r"--sides is \(1.5,\); expected a list of integers."),
        ({"mean": [1, 2]}, r"mean is \(1, 2\); expected 3 numbers."),
        ({"mean": "abc"}, "mean is 'abc'; expected 3 numbers."),
        ({"maybe": 1}, "--maybe is 1; expected a path or none."),
        ({"inner": 1}, "expected a JSON object for the inner, found 1."),
        ({"inner": {"size": "1"}}, "--size is '1'; expected an integer."),
        ({"inner": {"x" * 90: 1, 5: 1}}, r"unknown field 'x+\.\.\.x+', 5 in the inner; was"),
    ],
)
def test_wrong_type_is_an_error(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_fields(Outer, {"place": "a"} | change)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": float("nan")}, "scores has nan; expected a string or a finite number"),
        ([2**64], "scores has 18446744073709551616; expected"),
        ({"a": {1: 2}}, r"scores has the key \[1\]; expected a string"),
        ({"a": object()}, "scores has <object.*>; expected"),
        ([[[[[[[[[[1]]]]]]]]]], "scores is nested more than 8 levels deep"),
    ],
)
def test_value_that_json_cannot_hold_is_an_error(value: Any, text: str) -> None:
    require_json_value({"a": [1, 0.5, None, "x", True]}, "scores")
    with pytest.raises(ConfigError, match=text):
        require_json_value(value, "scores")


def test_short_repr_of_huge_values() -> None:
    deep: Any = 0
    for _ in range(5000):
        deep = [deep]
    for value in (10**5000, -(10**5000), "x" * 10**6, ["y" * 10**6] * 100, deep, {"a": deep}, b"z"):
        assert len(short_repr(value)) < 1000
    assert short_repr(10**30) == "1" + "0" * 30
