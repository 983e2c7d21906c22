"""What the checks of all operators share: pairs of numbers, choices, and where tensors lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dcnseg.errors import ConfigError, ShapeError

Pair: TypeAlias = tuple[int, int]

MOST_SIZE = 2**31 - 1  # of an axis, and of what the operators count in int32


def make_pair(value: int | tuple[int, ...], name: str, least: int = 1) -> Pair:
    """One integer for both axes, or one for each, as (y, x).

    Raises:
        ShapeError: `value` is not one or two integers from `least` to `MOST_SIZE`.
    """
    # As a rule: spares most of what a small call takes.
    if type(value) is int and least <= value <= MOST_SIZE:
        return value, value
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(is_integer(n) and n >= least for n in pair):
        raise ShapeError(
            f"`{name}` is {value!r}; expected one or two integers of at least {least}."
        )
    if any(exceeds(n, MOST_SIZE) for n in pair):
        raise ShapeError(
            f"`{name}` is {value!r}; expected one or two integers of at most {MOST_SIZE}."
        )
    y, x = (n if isinstance(n, torch.SymInt) else int(n) for n in pair)
    return y, x


def make_pair_or(default: Pair, value: int | Pair | None, name: str) -> Pair:
    """`make_pair`, or the default where nothing is given."""
    return default if value is None else make_pair(value, name)


def is_integer(value: object) -> bool:
    """NumPy's integers, and the sizes of a graph that is being exported, are integers, too."""
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def exceeds(value: int, most: int) -> bool:
    """Whether a size is too large; one that a graph leaves open is not fixed by the question."""
    return not isinstance(value, torch.SymInt) and value > most


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Raise a ConfigError unless `value` is one of the choices."""
    if value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ConfigError(f"`{name}` is {value!r}; expected {', '.join(others)} or {last}.")


def check_memory(needed: int, device: torch.device, what: str, *sizes: object) -> None:
    """Raise a ShapeError if more bytes are needed than the device has.

    Not asked while a graph is made, as nothing is allocated then.

    Args:
        needed: Bytes.
        device: Where they are needed.
        what: For the message, with {} for each of the sizes.
        sizes: What is asked for.
    """
    if torch.compiler.is_compiling() or not exceeds(needed, _memory_of(device)):
        return
    raise ShapeError(
        f"{what.format(*sizes)} would need {needed / 1e9:.4g} GB, and {device} has "
        f"{_memory_of(device) / 1e9:.4g} GB of memory. Choose smaller sizes."
    )


@cache
def _memory_of(device: torch.device) -> int:
    """Bytes; what cannot be asked has no limit but that of a tensor."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2**63 - 1


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
