"""Shared by the tests of several operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcnseg.ops._native import missing_reason

NEEDS_NATIVE = pytest.mark.skipif(
    missing_reason("cpu") is not None, reason=f"no native operators: {missing_reason('cpu')}"
)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values with different strides."""
    padded = torch.zeros([n + 2 for n in tensor.shape], dtype=tensor.dtype)
    inner = padded[tuple(slice(1, -1) for _ in tensor.shape)]
    inner.copy_(tensor)
    result = {"contiguous": tensor.contiguous(), "slice": inner}
    if tensor.dim() > 1:
        result["transposed"] = tensor.mT.contiguous().mT
    if tensor.dim() == 4:
        result["channels-last"] = tensor.contiguous(memory_format=torch.channels_last)
        result["channels outermost"] = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        result["batch innermost"] = tensor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return result
