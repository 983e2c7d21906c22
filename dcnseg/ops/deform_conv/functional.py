"""Functional interface of the deformable convolution: `deform_conv2d`."""

from __future__ import annotations

import torch
from torch import Tensor

from dcnseg.errors import ShapeError
from dcnseg.ops.backend import Backend, use_native
from dcnseg.ops.checks import Pair
from dcnseg.ops.deform_conv.checks import Border, Window, check_arguments, make_window
from dcnseg.ops.deform_conv.native import cuda_self_test, deform_conv2d_native
from dcnseg.ops.deform_conv.reference import deform_conv2d_reference

_LARGE = 2**30  # elements; smaller outputs and copies are not checked against the memory
# At import: torch.compile of torch 2.11 cannot trace is_autocast_available.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)
)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    mask: Tensor | None = None,
    *,
    border: Border = "zero",
    backend: Backend = "auto",
) -> Tensor:
    """Deformable convolution v2, or v1 if `mask` is None.

    Each kernel tap samples `input` bilinearly at its position plus an offset. A NaN or infinite
    offset gives NaN in the output. Positions are computed in at least float32. Under autocast,
    `input`, `weight` and `bias` are cast as in a convolution. The arguments are laid out as in
    torchvision.ops.deform_conv2d.

    Args:
        input: Input map, [B, C, H, W].
        offset: Offsets of the taps in pixels of `input`, [B, 2*G*T, H_out, W_out]. The channels
            are ordered by offset group, then tap (row-major), then (dy, dx).
        weight: Kernel, [C_out, C/groups, kh, kw]. Its second size determines the number of groups.
        bias: Bias, [C_out].
        stride: Distance between output positions in pixels, (y, x) or one integer for both.
        padding: Number of rows and columns of zeros around `input`, (y, x) or one integer.
        dilation: Distance between taps without offsets in pixels, (y, x) or one integer.
        mask: Modulation, a factor of each sample, [B, G*T, H_out, W_out].
        border: How samples near and outside the border of `input` are computed.
            "zero": `input` is surrounded by zeros, with which samples within one pixel of the
            border are interpolated, as in the paper, torchvision and mmcv.
            "dcnv1", for weights trained with the original code of 2017: a sample is zero unless
            0 <= y < H and 0 <= x < W, and the last row and column are replicated.
        backend: "native", "reference" (PyTorch) or "auto", which uses the native operator if it is
            available for the device of the tensors, and otherwise the reference with a warning.

    Returns:
        Output map, [B, C_out, H_out, W_out], in the dtype and memory format of `input`.

    Raises:
        ShapeError: Shapes, dtypes or devices do not agree, or the output does not fit in memory.
        ConfigError: `backend` or `border` is not one of the values above.
        NativeOpsError: `backend` is "native" and the native operator is not available.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", eq. 2-4. Modulation: Zhu et al.
    2019, "Deformable ConvNets v2".
    """
    window = make_window(stride, padding, dilation, border)
    device_type = input.device.type
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        input, weight, bias = _autocast(input, weight, bias)
    tensors = (input, offset, weight, bias, mask)
    if use_native("deform_conv2d", backend, tensors, cuda_self_test):
        return _run_native(input, offset, weight, bias, window, mask)
    check_arguments(input, offset, weight, bias, window, mask)
    return deform_conv2d_reference(input, offset, weight, bias, window, mask)


def _run_native(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    mask: Tensor | None,
) -> Tensor:
    """Call the native operator; if it raises, raise the ShapeError that explains why.

    The operator checks its arguments itself, faster than Python does. They are checked before the
    call only under torch.compile, which does not run the operator, for an empty `bias` or `mask`,
    which the operator treats as None, and where the output or a contiguous copy of an expanded
    `input` may not fit in memory.
    """
    if (
        torch.compiler.is_compiling()
        or _is_empty(bias)
        or _is_empty(mask)
        or max(input.numel(), offset.numel() * weight.shape[:1].numel()) > _LARGE
    ):
        check_arguments(input, offset, weight, bias, window, mask)
    try:
        return deform_conv2d_native(input, offset, weight, bias, window, mask)
    except RuntimeError:
        try:
            check_arguments(input, offset, weight, bias, window, mask)
        except ShapeError as error:
            raise error from None
        raise


def _is_empty(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.numel() == 0


def _autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast does for a convolution; `offset` and `mask` keep their dtypes."""
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(tensor: Tensor) -> Tensor:
        is_eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if is_eligible else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)
