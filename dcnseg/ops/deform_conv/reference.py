"""Reference implementation of the deformable convolution in PyTorch, also used as the fallback.

Shape letters: B batch, C channels, H height, W width, G offset groups, T = kh*kw taps, Cg = C/G.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dcnseg.ops.deform_conv.checks import Border, Window

# Maximum number of sampled values, B * rows * W_out * C * T, of a tile of output rows: 64 MiB in
# float32.
_TILE_ELEMENTS = 1 << 24


def deform_conv2d_reference(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    mask: Tensor | None,
) -> Tensor:
    """Deformable convolution of checked arguments; see `dcnseg.ops.deform_conv2d`.

    Runs on every device and in every floating-point dtype and is differentiable any number of
    times. Samples are computed tile by tile, and again in the backward, to limit memory use.

    Returns:
        [B, C_out, H_out, W_out] in the promoted dtype of `input` and `weight`.
    """
    kernel_size = (weight.shape[2], weight.shape[3])
    taps = kernel_size[0] * kernel_size[1]
    batch, channels, height, width = input.shape
    offset_groups = offset.shape[1] // (2 * taps)
    out_height, out_width = offset.shape[-2:]

    # Each (image, group) ends with a pixel of zeros, which corners outside the map read.
    pixels = input.reshape(batch, offset_groups, channels // offset_groups, height * width)
    pixels = torch.cat([pixels, pixels.new_zeros((*pixels.shape[:3], 1))], dim=3)
    pixels = pixels.transpose(2, 3).flatten(0, 2)  # [B*G*(H*W+1), Cg]
    positions = offset.unflatten(1, (offset_groups, taps, 2))  # [B, G, T, 2, H_out, W_out]
    masks = None if mask is None else mask.unflatten(1, (offset_groups, taps))

    row_elements = max(1, batch * out_width * channels * taps)
    rows = max(1, _TILE_ELEMENTS // row_elements)
    tiles = []
    for top in range(0, out_height, rows):
        bottom = min(top + rows, out_height)
        grid = _tap_grid(offset, (top, bottom), kernel_size, window)
        arguments = (
            pixels,
            positions[..., top:bottom, :],
            None if masks is None else masks[..., top:bottom, :],
            weight,
            grid,
            (height, width),
            window.border,
        )
        if torch.is_grad_enabled() and rows < out_height:  # recompute the samples in the backward
            tile = checkpoint(
                _convolve_tile, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            tile = _convolve_tile(*arguments)
        tiles.append(tile)
    output = torch.cat(tiles, dim=2) if len(tiles) != 1 else tiles[0]
    return output if bias is None else output + bias.to(output.dtype)[:, None, None]


def _tap_grid(
    like: Tensor,
    rows: tuple[int, int],
    kernel_size: tuple[int, int],
    window: Window,
) -> tuple[Tensor, Tensor]:
    """Tap positions without offsets: y [T, rows, 1] and x [T, 1, W_out], in pixels of the input.

    Computed from integers, as in the native code: float32 is not exact above 2**24.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    device = like.device
    stride, padding, dilation = window.stride, window.padding, window.dilation
    taps_y = (torch.arange(kernel_size[0], device=device) * dilation[0]).to(dtype)
    taps_x = (torch.arange(kernel_size[1], device=device) * dilation[1]).to(dtype)
    out_y = (torch.arange(*rows, device=device) * stride[0] - padding[0]).to(dtype)
    out_x = (torch.arange(like.shape[-1], device=device) * stride[1] - padding[1]).to(dtype)
    grid_y = taps_y.repeat_interleave(kernel_size[1])[:, None, None] + out_y[:, None]
    grid_x = taps_x.repeat(kernel_size[0])[:, None, None] + out_x
    return grid_y, grid_x


def _convolve_tile(
    pixels: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    grid: tuple[Tensor, Tensor],
    size_hw: tuple[int, int],
    border: Border,
) -> Tensor:
    """Convolve one tile of output rows: sample every tap, then multiply by the kernel."""
    batch, _, taps, _, rows, columns = offset.shape
    y = offset[:, :, :, 0] + grid[0]  # [B, G, T, rows, W_out], at least float32
    x = offset[:, :, :, 1] + grid[1]
    zero = 0 * y.detach() + 0 * x.detach()  # NaN if y or x is not finite
    y, x = y + zero, x + zero  # so that both gradients are NaN
    if border == "dcnv1":
        y, x = _clamp_to_edge(y, x, size_hw)
    sampled = _sample(pixels, y, x, size_hw)  # [B, G, T, rows, W_out, Cg]
    if mask is not None:
        sampled = sampled * mask.unsqueeze(-1)
    sampled = sampled.to(pixels.dtype).permute(0, 3, 4, 2, 1, 5)  # [B, rows, W_out, T, G, Cg]

    channels_per_group = weight.shape[1]
    groups = sampled.shape[4] * sampled.shape[5] // channels_per_group
    sampled = sampled.reshape(batch, rows * columns, taps, groups, channels_per_group)
    kernel = weight.reshape(groups, weight.shape[0] // groups, channels_per_group, taps)
    output = torch.einsum("bptgc,goct->bgop", sampled, kernel)
    return output.reshape(batch, weight.shape[0], rows, columns)


def _clamp_to_edge(y: Tensor, x: Tensor, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Clamp positions in [0, size) to [0, size - 1]; move all others to -2, where samples are 0."""
    height, width = size_hw
    outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
    y = torch.where(outside, -2, torch.where(y >= height - 1, height - 1, y))
    x = torch.where(outside, -2, torch.where(x >= width - 1, width - 1, x))
    return y, x


def _sample(pixels: Tensor, y: Tensor, x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Bilinear samples of the map surrounded by zeros, [..., Cg]."""
    height, width = size_hw
    top, left = torch.floor(y.detach()), torch.floor(x.detach())
    weight_y, weight_x = y - top, x - left  # the right-hand derivative at integer positions
    first = torch.arange(math.prod(y.shape[:2]), device=y.device) * (height * width + 1)
    first = first.view(*y.shape[:2], 1, 1, 1)  # first pixel of each (image, group)

    corners = []
    for row, along_y in ((top, 1 - weight_y), (top + 1, weight_y)):
        for column, along_x in ((left, 1 - weight_x), (left + 1, weight_x)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            row_index = torch.where(inside, row, 0).long()  # NaN is not inside
            column_index = torch.where(inside, column, 0).long()
            index = torch.where(inside, row_index * width + column_index, height * width)
            values = pixels.index_select(0, (index + first).flatten())
            values = values.view(*y.shape, pixels.shape[1])
            corners.append(values * (along_y * along_x).unsqueeze(-1))
    return corners[0] + corners[1] + corners[2] + corners[3]
