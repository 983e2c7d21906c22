"""Argument checks that all operators share."""

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

MAX_SIZE = 2**31 - 1  # of an axis, and of everything that the operators index with int32


def make_pair(value: int | tuple[int, ...], name: str, minimum: int = 1) -> Pair:
    """Convert one integer, or one per axis, to a pair (y, x).

    Raises:
        ShapeError: `value` is not one or two integers from `minimum` to `MAX_SIZE`.
    """
    # The common case, without the overhead of the general one.
    if type(value) is int and minimum <= value <= MAX_SIZE:
        return value, value
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(is_integer(n) and n >= minimum for n in pair):
        raise ShapeError(
            f"`{name}` is {value!r}; expected one or two integers of at least {minimum}."
        )
    if any(is_too_large(n, MAX_SIZE) for n in pair):
        raise ShapeError(
            f"`{name}` is {value!r}; expected one or two integers of at most {MAX_SIZE}."
        )
    y, x = (n if isinstance(n, torch.SymInt) else int(n) for n in pair)
    return y, x


def make_pair_or(default: Pair, value: int | Pair | None, name: str) -> Pair:
    """`make_pair`, or `default` if `value` is None."""
    return default if value is None else make_pair(value, name)


def is_integer(value: object) -> bool:
    """Return whether `value` is an int, a NumPy integer or a torch.SymInt, but not a bool."""
    return isinstance(value, (int, np.integer, torch.SymInt)) and not isinstance(value, bool)


def is_too_large(value: int, maximum: int) -> bool:
    """Return whether `value` > `maximum`; False for a torch.SymInt, to add no guard to a graph."""
    return not isinstance(value, torch.SymInt) and value > maximum


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Raise a ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ConfigError(f"`{name}` is {value!r}; expected {', '.join(others)} or {last}.")


def check_memory(needed: int, device: torch.device, what: str, *sizes: object) -> None:
    """Raise a ShapeError if an allocation is larger than the memory of the device.

    Does nothing under torch.compile, where nothing is allocated.

    Args:
        needed: Size of the allocation in bytes.
        device: Device of the allocation.
        what: Subject of the message, with a {} for each of `sizes`.
        sizes: Values that replace the {}.
    """
    if torch.compiler.is_compiling() or not is_too_large(needed, _total_memory(device)):
        return
    raise ShapeError(
        f"{what.format(*sizes)} would need {needed / 1e9:.4g} GB, but {device} has only "
        f"{_total_memory(device) / 1e9:.4g} GB of memory. Choose smaller sizes."
    )


@cache
def _total_memory(device: torch.device) -> int:
    """Memory of the device in bytes; 2**63 - 1 where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2**63 - 1


def check_device(tensor: Tensor, name: str, input: Tensor) -> None:
    """Raise a ShapeError unless `tensor` is on the device of `input`."""
    if tensor.device != input.device:
        raise ShapeError(
            f"`{name}` is on {tensor.device}, but `input` is on {input.device}. "
            "Move both to the same device."
        )


def shape_text(tensor: Tensor) -> str:
    """Return the shape as messages show it: "[2, 3]"."""
    return str(list(tensor.shape))
