"""JSON files in which something is wrong, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import strategies as st

from dcnseg.errors import DataError

Result = TypeVar("Result")

# What `json.dumps` cannot write is put into the text afterwards.
_RAW = {
    '"@digits"': "9" * 5000,
    '"@long"': "9" * 4000,
    '"@power"': "1e400",
    '"@deep"': "[" * 100_000 + "]" * 100_000,
    '"@half"': '"\\ud800"',
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text("abX0~", max_size=5)
    | st.sampled_from(
        ["@digits", "@long", "@power", "@deep", "@half", "\0", "a\nb", "3", "é" * 300]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=6,
)


@st.composite
def changed_somewhere(draw: st.DrawFn, value: Any) -> Any:
    """Put anything in the place of one value, at any depth, or leave the value out."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(list(keys)))
    copy: Any = value.copy()
    if draw(st.integers(0, 5)) == 0:
        del copy[key]
    else:
        copy[key] = draw(changed_somewhere(value[key]))
    return copy


def result_or_message(function: Callable[[], Result]) -> tuple[Result | None, str]:
    """Return what a reader returns, and the text of the DataError that it raises instead."""
    try:
        return function(), ""
    except DataError as error:
        return None, str(error)


def json_text(content: Any) -> bytes:
    """Return the bytes of a JSON file, `_RAW` filled in."""
    text = json.dumps(content, ensure_ascii=False)
    for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
    return text.encode("utf-8")
