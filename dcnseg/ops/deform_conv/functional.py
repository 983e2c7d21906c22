"""Deformable convolution: `deform_conv2d` and its module `DeformConv2d`.

Source: Dai et al. 2017, "Deformable Convolutional Networks", eq. 2-4; the modulation is
Zhu et al. 2019, "Deformable ConvNets v2". Argument layout as in torchvision.ops.deform_conv2d.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnseg.errors import ShapeError
from dcnseg.ops.backend import Backend, use_native
from dcnseg.ops.checks import Pair
from dcnseg.ops.deform_conv_checks import Border, Window, check_arguments, make_window
from dcnseg.ops.deform_conv_native import cuda_self_test, deform_conv2d_native
from dcnseg.ops.reference import deform_conv2d_reference

OFFSET_BRANCH = ".conv_offset."  # in the names of the parameters that predict offsets

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


class DeformConv2d(nn.Conv2d):
    """A drop-in for `nn.Conv2d` whose taps are displaced by offsets predicted from its input.

    `weight`, `bias` and every argument keep their names and meaning, so the weights of a plain
    convolution load and only `conv_offset` is missing. `conv_offset` starts at zero: the layer
    then equals the plain convolution. With a `padding_mode` other than "zeros" the padded map is
    what is sampled, and samples outside of it are zero. torch.compile and torch.export take the
    layer; torch.jit.script does not, as TorchScript lacks what chooses between native and PyTorch
    code.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels of the output.
        kernel_size: Taps (kh, kw), or one number for both.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`, "same" and "valid" too.
        dilation: As in `nn.Conv2d`.
        groups: As in `nn.Conv2d`.
        bias: As in `nn.Conv2d`.
        padding_mode: As in `nn.Conv2d`.
        device: As in `nn.Conv2d`.
        dtype: As in `nn.Conv2d`.
        offset_groups: G; each of G equal groups of input channels has its own offsets.
        modulated: Also predict a factor 2*sigmoid(.) for every sample (DCNv2).
        border: As in `deform_conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: str | int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
        border: Border = "zero",
    ) -> None:
        if offset_groups < 1 or in_channels % offset_groups:
            raise ShapeError(
                f"`in_channels`={in_channels} must be divisible by `offset_groups`={offset_groups}."
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.offset_groups = offset_groups
        self.modulated = modulated
        self.border: Border = border
        self.backend: Backend = "auto"
        padding_hw: tuple[int, ...] = (0, 0) if isinstance(self.padding, str) else self.padding
        make_window(self.stride, padding_hw, self.dilation, border)
        taps = self.kernel_size[0] * self.kernel_size[1]
        # skip_init: a seeded DeformConv2d draws the same `weight` as a seeded Conv2d.
        self.conv_offset = nn.utils.skip_init(
            nn.Conv2d,
            in_channels,
            (3 if modulated else 2) * offset_groups * taps,
            self.kernel_size,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            padding_mode=padding_mode,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        self._zero_offsets()

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
        border: Border = "zero",
    ) -> Self:
        """Make a deformable convolution of `conv`; the parameters are shared, not copied."""
        layer: Self = nn.utils.skip_init(
            cls,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            offset_groups=offset_groups,
            modulated=modulated,
            border=border,
        )
        layer._zero_offsets()
        layer.weight = conv.weight
        layer.bias = conv.bias
        return layer.train(conv.training)

    def reset_parameters(self) -> None:
        """Draw new weights as `nn.Conv2d` does, and set the offsets to zero again."""
        super().reset_parameters()
        if hasattr(self, "conv_offset"):
            self._zero_offsets()

    def predict_offset(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Offsets [B, 2*G*T, H_out, W_out] in pixels, and the mask [B, G*T, ...] if modulated."""
        prediction = self.conv_offset(input)
        if not self.modulated:
            return prediction, None
        offset_channels = prediction.shape[1] // 3 * 2
        offset, logits = prediction[:, :offset_channels], prediction[:, offset_channels:]
        return offset, 2 * torch.sigmoid(logits)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [B, C, H, W] with the offsets that `conv_offset` predicts from it."""
        offset, mask = self.predict_offset(input)
        padding: str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        elif isinstance(padding, str):
            input, padding = self._pad_for_string(input)
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,  # type: ignore[arg-type]  # torch declares tuple[int, ...]
            padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            mask,
            border=self.border,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Arguments as `nn.Conv2d` shows them, and those of the offsets."""
        text = f"{super().extra_repr()}, offset_groups={self.offset_groups}"  # type: ignore[no-untyped-call]
        text += ", modulated=True" if self.modulated else ""
        return text + (f", border={self.border}" if self.border != "zero" else "")

    def _zero_offsets(self) -> None:
        nn.init.zeros_(self.conv_offset.weight)
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.bias)

    def _pad_for_string(self, input: Tensor) -> tuple[Tensor, Pair]:
        """Padding "same" or "valid" as numbers; an odd total gets its last row or column here."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if bottom > top or right > left:
            input = F.pad(input, (0, right - left, 0, bottom - top))
        return input, (top, left)


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
