"""Memory formats: which one an output is to have, and tensors dense enough for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(input: Tensor) -> bool:
    """Whether an output is to be channels-last: `input` is, and not contiguous as well."""
    return not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    """The format's name in torch."""
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or channels-last, as the kernels need it."""
    return tensor if is_channels_last(tensor) else tensor.contiguous()
