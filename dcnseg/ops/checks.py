"""What the checks of all operators share: pairs of numbers, choices, and where tensors lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dcnseg.errors import ConfigError, ShapeError

Pair: TypeAlias = tuple[int, int]


def make_pair(value: int | tuple[int, ...], name: str, least: int = 1) -> Pair:
    """One integer for both axes, or one for each, as (y, x).

    Raises:
        ShapeError: `value` is not one or two integers of at least `least`.
    """
    if type(value) is int and value >= least:  # as a rule: spares most of what a small call takes
        return value, value
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(is_integer(n) and n >= least for n in pair):
        raise ShapeError(
            f"`{name}` is {value!r}; expected one or two integers of at least {least}."
        )
    y, x = (n if isinstance(n, torch.SymInt) else int(n) for n in pair)
    return y, x


def make_pair_or(default: Pair, value: int | Pair | None, name: str) -> Pair:
    """`make_pair`, or the default where nothing is given."""
    return default if value is None else make_pair(value, name)


def is_integer(value: object) -> bool:
    """NumPy's integers, and the sizes of a graph that is being exported, are integers, too."""
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Raise a ConfigError unless `value` is one of the choices."""
    if value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ConfigError(f"`{name}` is {value!r}; expected {', '.join(others)} or {last}.")


def check_device(tensor: Tensor, name: str, input: Tensor) -> None:
    """Raise a ShapeError unless `tensor` is where `input` is."""
    if tensor.device != input.device:
        raise ShapeError(
            f"`{name}` is on {tensor.device} and `input` on {input.device}; "
            "move them to one device."
        )


def shape_text(tensor: Tensor) -> str:
    """The shape as messages give it: "[2, 3]"."""
    return str(list(tensor.shape))
