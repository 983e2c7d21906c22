"""The operators. Each has a definition in plain PyTorch and, where it was built, native code."""

from dcnseg.ops._native import native_status
from dcnseg.ops.deform_conv import DeformConv2d, deform_conv2d

__all__ = ["DeformConv2d", "deform_conv2d", "native_status"]
