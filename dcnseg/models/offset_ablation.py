"""What a network does without its learned offsets; entry point `replace_offsets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from dcnseg.errors import ConfigError
from dcnseg.models.segmenter import Segmenter
from dcnseg.ops.deform_conv.module import DeformConv2d

ABLATIONS: Final = ("zeroed", "shuffled")


@contextmanager
def replace_offsets(model: Segmenter, how: str, *, seed: int = 0) -> Iterator[None]:
    """Replace the offsets of every deformable layer within the context.

    "zeroed" offsets give a plain convolution with the trained weights. "shuffled" offsets are those
    of a random other position of the map, so that their distribution is unchanged but not their
    place. The modulation is kept.

    Raises:
        ConfigError: `how` is neither "zeroed" nor "shuffled".
    """
    if how not in ABLATIONS:
        raise ConfigError(f"`how` is {how!r}; expected one of {', '.join(ABLATIONS)}.")
    generator = torch.Generator().manual_seed(seed)
    handles = [
        layer.conv_offset.register_forward_hook(partial(_replace, layer, how, generator))
        for layer in model.deformable_layers().values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replace(
    layer: DeformConv2d, how: str, generator: torch.Generator, _: Any, __: Any, output: Tensor
) -> Tensor:
    """Return the prediction of `conv_offset`, [B, C, H, W], with other offsets."""
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    channels = 2 * layer.offset_groups * taps  # the rest is the modulation
    offset, modulation = output[:, :channels], output[:, channels:]
    if how == "zeroed":
        offset = torch.zeros_like(offset)
    else:
        order = torch.randperm(offset.shape[2] * offset.shape[3], generator=generator)
        offset = offset.flatten(2)[..., order.to(offset.device)].view_as(offset)
    return torch.cat([offset, modulation], dim=1)
