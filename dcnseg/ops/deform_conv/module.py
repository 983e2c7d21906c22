"""Module interface of the deformable convolution: `DeformConv2d`."""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnseg.errors import ShapeError
from dcnseg.ops.backend import Backend
from dcnseg.ops.checks import Pair
from dcnseg.ops.deform_conv.checks import Border, make_window
from dcnseg.ops.deform_conv.functional import deform_conv2d

OFFSET_BRANCH = ".conv_offset."  # part of the names of parameters that predict offsets


class DeformConv2d(nn.Conv2d):
    """Drop-in replacement for `nn.Conv2d` that predicts the offsets of its taps from its input.

    `weight`, `bias` and the arguments of `nn.Conv2d` keep their names and meaning, so that the
    state dict of an `nn.Conv2d` loads and only the keys of `conv_offset` are missing. `conv_offset`
    is initialized to zero, so that the layer initially equals the plain convolution. With a
    `padding_mode` other than "zeros", the padded input is sampled, and samples outside it are zero.
    torch.compile and torch.export support the layer; torch.jit.script does not.

    The attribute `backend`, "auto" by default, is passed to `deform_conv2d`.

    Shape:
        - Input: [B, C, H, W].
        - Output: [B, C_out, H_out, W_out].

    Args:
        in_channels: Number of input channels C.
        out_channels: Number of output channels C_out.
        kernel_size: Kernel size (kh, kw), or one integer for both.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`, including "same" and "valid".
        dilation: As in `nn.Conv2d`.
        groups: As in `nn.Conv2d`.
        bias: As in `nn.Conv2d`.
        padding_mode: As in `nn.Conv2d`.
        device: As in `nn.Conv2d`.
        dtype: As in `nn.Conv2d`.
        offset_groups: Number of offset groups G. Each of the G groups of C/G input channels has
            its own offsets.
        modulated: Whether to predict a mask as well, 2*sigmoid(logits) in (0, 2) (DCNv2).
        border: As in `deform_conv2d`.

    Raises:
        ShapeError: `in_channels` is not divisible by `offset_groups`, or a stride, padding or
            dilation is out of its range.
        ConfigError: `border` is not one of the values of `deform_conv2d`.
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
                f"`in_channels` is {in_channels}; expected a multiple of "
                f"offset_groups={offset_groups}, which must be at least 1."
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
        # skip_init: with the same seed, `weight` is initialized as in nn.Conv2d.
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
        zero_parameters(self.conv_offset)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
        border: Border = "zero",
    ) -> Self:
        """Convert `conv` to a deformable convolution that shares its parameters.

        Arguments and exceptions are those of the constructor.
        """
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
        zero_parameters(layer.conv_offset)
        layer.weight = conv.weight
        layer.bias = conv.bias
        return layer.train(conv.training)

    def reset_parameters(self) -> None:
        """Initialize `weight` and `bias` as in `nn.Conv2d`, and `conv_offset` to zero."""
        super().reset_parameters()
        if hasattr(self, "conv_offset"):
            zero_parameters(self.conv_offset)

    def predict_offset(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict offsets and mask from the input.

        Args:
            input: Input map, [B, C, H, W].

        Returns:
            `offset`, [B, 2*G*T, H_out, W_out], in pixels, and `mask`, [B, G*T, H_out, W_out], in
            (0, 2), or None if the layer is not modulated. See `deform_conv2d`.
        """
        prediction = self.conv_offset(input)
        if not self.modulated:
            return prediction, None
        offset_channels = prediction.shape[1] // 3 * 2
        offset, logits = prediction[:, :offset_channels], prediction[:, offset_channels:]
        return offset, 2 * torch.sigmoid(logits)

    def forward(self, input: Tensor) -> Tensor:
        """Return the deformable convolution of [B, C, H, W] with the predicted offsets."""
        offset, mask = self.predict_offset(input)
        input, padding = self.pad_input(input)
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,  # type: ignore[arg-type]  # torch declares tuple[int, ...]
            padding,
            self.dilation,  # type: ignore[arg-type]
            mask,
            border=self.border,
            backend=self.backend,
        )

    def pad_input(self, input: Tensor) -> tuple[Tensor, Pair]:
        """Pad the input as far as the operator cannot.

        Returns:
            The input, [B, C, H', W'], and the padding with zeros that is left, (y, x).
        """
        padding = self.padding
        if self.padding_mode != "zeros":
            padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return padded, (0, 0)
        if isinstance(padding, str):
            return self._pad_for_string(input)
        return input, (padding[0], padding[1])

    def extra_repr(self) -> str:
        """Show the arguments of `nn.Conv2d` and those of the offsets."""
        text = f"{super().extra_repr()}, offset_groups={self.offset_groups}"  # type: ignore[no-untyped-call]
        text += ", modulated=True" if self.modulated else ""
        return text + (f", border={self.border}" if self.border != "zero" else "")

    def _pad_for_string(self, input: Tensor) -> tuple[Tensor, Pair]:
        """Convert "same" or "valid" to pixels; pad the last row or column of an odd total here."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if bottom > top or right > left:
            input = F.pad(input, (0, right - left, 0, bottom - top))
        return input, (top, left)


def zero_parameters(layer: nn.Module) -> None:
    """Set all parameters to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
