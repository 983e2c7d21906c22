"""The deformable convolution as a function: `deform_conv2d`.

Source: Dai et al. 2017, "Deformable Convolutional Networks", eq. 2-4; the modulation is
Zhu et al. 2019, "Deformable ConvNets v2". Argument layout as in torchvision.ops.deform_conv2d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcnseg.errors import ShapeError
from dcnseg.ops.backend import Backend, use_native
from dcnseg.ops.checks import Pair
from dcnseg.ops.deform_conv.checks import Border, Window, check_arguments, make_window
from dcnseg.ops.deform_conv.native import cuda_self_test, deform_conv2d_native
from dcnseg.ops.deform_conv.reference import deform_conv2d_reference

_LARGE = 2**30  # elements; an output of fewer fits in any memory
# Asked once: torch.compile of torch 2.11 cannot trace the question.
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
    """Convolve with every kernel tap displaced by its own offset, sampling bilinearly.

    A sample outside the map is zero, by default fading over the last pixel. A NaN or infinite
    offset gives NaN at its output positions. Positions are computed in float32 at least. Under
    autocast, input, weight and bias are cast as a convolution's are.

    Args:
        input: Map to sample, [B, C, H, W].
        offset: Displacement of every tap in pixels of `input`, (dy, dx) interleaved, taps
            row-major, the offset group outermost, [B, 2*G*T, H_out, W_out].
        weight: Kernel, [C_out, C/groups, kh, kw]; its second size gives the number of groups.
        bias: Added to every output position, [C_out].
        stride: Step between output positions in pixels, (y, x) or one number for both.
        padding: Rows and columns of zeros assumed around `input`.
        dilation: Distance between the taps before they are displaced, in pixels.
        mask: Factor of every sample (modulation), [B, G*T, H_out, W_out].
        border: "zero": the map goes on with zeros, as in the paper, torchvision and mmcv.
            "dcnv1", for weights trained with the code of 2017: a sample is zero unless
            0 <= y < H and 0 <= x < W, and behind the last row and column they are replicated.
        backend: "native" or "reference" code, or "auto": native where it was built for the
            tensors' device, else the PyTorch code with one warning that gives the reason.

    Returns:
        [B, C_out, H_out, W_out] in the dtype of `input`, in the memory format of `input`.

    Raises:
        ShapeError: A shape, dtype or device disagrees with the others; the message gives both.
        ConfigError: `backend` or `border` is none of those above.
        NativeOpsError: `backend="native"`, and there is no native code for this device.
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
    """Call the native operator, and say in the caller's words why it refuses, if it does.

    The operator checks its arguments itself, in less time than Python takes. Here they are
    checked before only in torch.compile, where the operator does not run yet while the graph is
    made, for an empty `bias` or `mask`, which the operator would take for none, and where the
    output may be too large for the memory.
    """
    if (
        torch.compiler.is_compiling()
        or _is_empty(bias)
        or _is_empty(mask)
        or offset.numel() * weight.shape[:1].numel() > _LARGE
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
    """Cast what a convolution would cast; positions keep their own precision."""
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)
