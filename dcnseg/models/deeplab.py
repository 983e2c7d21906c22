"""The decoders: DeepLabV3 and DeepLabV3+ of segmentation-models-pytorch, or none.

Entry point: `build_decoder`.
"""

from __future__ import annotations

from collections.abc import Sequence

from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.base import initialization as smp_initialization
from segmentation_models_pytorch.decoders.deeplabv3.decoder import (
    DeepLabV3Decoder,
    DeepLabV3PlusDecoder,
)
from torch import Tensor, nn

ASPP_DROPOUT = 0.5
HEAD_STRIDE = 4  # stride of the DeepLabV3+ decoder's output


class LastFeatureMap(nn.Module):
    """A decoder without layers: returns the encoder's last feature map."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the last of the feature maps."""
        return features[-1]


def build_decoder(
    architecture: str,
    *,
    encoder_channels: Sequence[int],
    output_stride: int,
    decoder_channels: int,
    atrous_rates: Sequence[int],
    num_classes: int,
) -> tuple[nn.Module, nn.Module]:
    """Build the decoder and the segmentation head, initialized as in smp.

    Args:
        architecture: "deeplabv3", "deeplabv3plus", or "plain": only the head's 1x1 convolution on
            the last feature map, as in Dai et al. 2017, section 4.1.
        encoder_channels: Channels of each encoder feature map, starting with the input.
        output_stride: Stride of the last feature map, 8 or 16.
        decoder_channels: Channels of the ASPP and of the decoder's output.
        atrous_rates: Dilations of the ASPP's three branches, in pixels of the last feature map.
        num_classes: K, channels of the logits.
    """
    decoder: nn.Module
    if architecture == "plain":
        head = SegmentationHead(
            encoder_channels[-1], num_classes, kernel_size=1, upsampling=output_stride
        )
        smp_initialization.initialize_head(head)
        return LastFeatureMap(), head
    if architecture == "deeplabv3":
        decoder = DeepLabV3Decoder(
            in_channels=encoder_channels[-1],
            out_channels=decoder_channels,
            atrous_rates=atrous_rates,
            aspp_separable=False,
            aspp_dropout=ASPP_DROPOUT,
        )
    else:
        decoder = DeepLabV3PlusDecoder(
            encoder_channels=encoder_channels,
            encoder_depth=len(encoder_channels) - 1,
            out_channels=decoder_channels,
            atrous_rates=atrous_rates,
            output_stride=output_stride,
            aspp_separable=True,
            aspp_dropout=ASPP_DROPOUT,
        )
    head = SegmentationHead(
        decoder_channels,
        num_classes,
        kernel_size=1,
        upsampling=output_stride if architecture == "deeplabv3" else HEAD_STRIDE,
    )
    smp_initialization.initialize_decoder(decoder)
    smp_initialization.initialize_head(head)
    return decoder, head
