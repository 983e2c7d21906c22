"""Lazy maps that are computed a few rows at a time, to save the memory of large maps.

A `StripMap` has a size and computes any range of its rows on request. The functions create one from
a tensor (`stored`) or from other maps (`resized`, `cropped`, ...). The values equal those of the
corresponding torch operation on the whole map, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class StripMap:
    """A map [K, H, W] whose rows are computed on request."""

    size_hw: tuple[int, int]
    rows: Callable[[int, int], Tensor]  # (start, stop) -> float32 [K, stop - start, W]


def stored(values: Tensor) -> StripMap:
    """Return a map with the values of a tensor [K, H, W]."""
    height, width = values.shape[-2:]
    return StripMap((height, width), lambda start, stop: values[:, start:stop].float())


def cropped(source: StripMap, size_hw: tuple[int, int]) -> StripMap:
    """Return the upper left part of a map."""
    width = size_hw[1]
    return StripMap(size_hw, lambda start, stop: source.rows(start, stop)[..., :width])


def softmaxed(source: StripMap) -> StripMap:
    """Return the softmax over the K channels."""
    return StripMap(source.size_hw, lambda start, stop: source.rows(start, stop).softmax(dim=0))


def mirrored(source: StripMap) -> StripMap:
    """Return a horizontally flipped map."""
    return StripMap(source.size_hw, lambda start, stop: source.rows(start, stop).flip(-1))


def averaged(sources: Sequence[StripMap]) -> StripMap:
    """Return the mean of maps of equal size."""

    def rows(start: int, stop: int) -> Tensor:
        total = sources[0].rows(start, stop)
        for source in sources[1:]:
            total = total + source.rows(start, stop)
        return total / len(sources)

    return sources[0] if len(sources) == 1 else StripMap(sources[0].size_hw, rows)


def resized(source: StripMap, size_hw: tuple[int, int], *, align_corners: bool = False) -> StripMap:
    """Return a map that is resized bilinearly, like `torch.nn.functional.interpolate`."""
    if source.size_hw == size_hw:
        return source

    def rows(start: int, stop: int) -> Tensor:
        y = _source_positions(start, stop, source.size_hw[0], size_hw[0], align_corners)
        low = y.long().clamp_max(source.size_hw[0] - 1)
        high = (low + 1).clamp_max(source.size_hw[0] - 1)
        first = int(low[0])
        values = source.rows(first, int(high[-1]) + 1)
        low, high, share = (item.to(values.device) for item in (low, high, (y - low)[:, None]))
        values = values[:, low - first] * (1 - share) + values[:, high - first] * share
        return F.interpolate(values, size=size_hw[1], mode="linear", align_corners=align_corners)

    return StripMap(size_hw, rows)


def _source_positions(
    start: int, stop: int, source_length: int, length: int, align_corners: bool
) -> Tensor:
    """Return the fractional source rows of output rows start..stop, in float32 like torch."""
    rows = torch.arange(start, stop, dtype=torch.float32)
    if align_corners:
        scale = (source_length - 1) / (length - 1) if length > 1 else 0.0
        return rows * torch.tensor(scale, dtype=torch.float32)
    scale = source_length / length
    return ((rows + 0.5) * torch.tensor(scale, dtype=torch.float32) - 0.5).clamp_min(0)
