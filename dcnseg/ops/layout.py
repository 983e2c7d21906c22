"""Memory formats of the operators' tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(input: Tensor) -> bool:
    """Return whether the output for `input` is channels-last: `input` is so, and not contiguous."""
    return not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the torch.memory_format."""
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(tensor: Tensor) -> Tensor:
    """Return `tensor` if it is contiguous or channels-last, else a contiguous copy."""
    return tensor if is_channels_last(tensor) else tensor.contiguous()
