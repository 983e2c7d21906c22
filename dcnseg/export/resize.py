"""Resizing of images within an exported graph, at sizes that are known only when it runs.

OpenVINO does not have torch's antialiased resize, and runtimes of ONNX differ in theirs. Here it is
a product with two matrices of filter weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final

import torch
from torch import Tensor

_MAX_DENOMINATOR: Final = 10**6  # of a scale as a fraction


def scaled_length(length: int, scale: float) -> int:
    """Return `round(length * scale)`, computed with integers as exported graphs have them.

    The scale is the simplest fraction near the float. For few lengths, such as 45 * 0.7 =
    31.499999999999996 instead of 31.5, the result is therefore not that of floats but one more or
    less.
    """
    share = Fraction(scale).limit_denominator(_MAX_DENOMINATOR)
    divisor = share.denominator
    scaled = share.numerator * length
    if divisor % 2:
        return (2 * scaled + divisor) // (2 * divisor)
    # Ties go to the even integer. Only sums of floor divisions: torch.export takes minutes to
    # reason about products of them, and OpenVINO has no rule for the modulo of sizes.
    half = divisor // 2
    is_tie_below_odd = (scaled - half) // (2 * divisor) - (scaled - half - 1) // (2 * divisor)
    return (scaled + half) // divisor - is_tie_below_odd


def resize_antialiased(x: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Resize [B, C, H, W] like `interpolate(x, size_hw, mode="bilinear", antialias=True)`."""
    rows = _filter_weights(x.shape[-2], size_hw[0])  # [h, H]
    columns = _filter_weights(x.shape[-1], size_hw[1])  # [w, W]
    return rows @ x @ columns.T


def _filter_weights(source_length: int, length: int) -> Tensor:
    """Return the weights of the source pixels for each pixel of the result, [length, source]."""
    source = torch.arange(source_length, dtype=torch.float32) + 0.5
    target = torch.arange(length, dtype=torch.float32) + 0.5
    ratio = (source[-1:] + 0.5) / (target[-1:] + 0.5)  # of the lengths
    distance = (source - (target * ratio)[:, None]).abs() / ratio.clamp(min=1.0)
    weights = (1 - distance).clamp(min=0.0)
    return weights / weights.sum(dim=1, keepdim=True)
