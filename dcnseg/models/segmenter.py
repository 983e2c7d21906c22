"""The segmentation network: encoder -> decoder -> head, for images of any size.

Entry point: `build_segmenter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnseg.config import ModelConfig
from dcnseg.errors import ConfigError, ShapeError
from dcnseg.models.deeplab import build_decoder
from dcnseg.models.encoder import build_encoder, dilate_late, make_deformable
from dcnseg.models.region_head import RegionHead, RegionOutput
from dcnseg.ops.deform_conv.module import DeformConv2d


class Segmenter(nn.Module):
    """A DeepLab with the parameter names of segmentation-models-pytorch.

    State dicts of smp's models can be loaded; only the offset branches are then missing.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        segmentation_head: nn.Module,
        *,
        output_stride: int,
        region_head: RegionHead | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.segmentation_head = segmentation_head
        self.region_head = region_head
        self.output_stride = output_stride

    def forward(
        self, x: Tensor, propose: Callable[[Tensor], Sequence[Tensor]] | None = None
    ) -> Tensor | tuple[Tensor, RegionOutput]:
        """Compute the logits of a batch of normalized images.

        Args:
            x: Normalized images, [B, 3, H, W], of any size.
            propose: Only with a region head: called with the logits, returns the regions of each
                image for the head, as boxes [Ri, 4] in pixels of `x`.

        Returns:
            Logits, [B, K, H, W]; with `propose` also the output of the region head.

        Raises:
            ShapeError: `x` is not [B, 3, H, W], or B is 1 in training mode, where the batch
                normalization of the ASPP's pooled features needs at least 2, unless other processes
                have more images.
        """
        height, width = x.shape[-2:]
        features = self._encode(x)
        logits: Tensor = self.segmentation_head(self.decoder(features))[..., :height, :width]
        if propose is None:
            return logits
        head = self.require_region_head()
        return logits, head(head.fuse(features), propose(logits))

    def coarse_logits(self, x: Tensor) -> Tensor:
        """Compute the logits before the head's upsampling; arguments and errors as for `forward`.

        Returns:
            Logits, [B, K, h, w]. Bilinear upsampling by `logits_stride` with `align_corners=True`
            gives the logits of the input, padded at the bottom and right.
        """
        return self._coarse_logits(self._encode(x))

    def coarse_logits_and_region_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `coarse_logits`, and the map that the region head pools from, [B, C, h, w]."""
        features = self._encode(x)
        return self._coarse_logits(features), self.require_region_head().fuse(features)

    def region_map(self, x: Tensor) -> Tensor:
        """Compute only the map that the region head pools from, [B, C, h, w]."""
        return self.require_region_head().fuse(self._encode(x))

    def _coarse_logits(self, features: Sequence[Tensor]) -> Tensor:
        logits: Tensor = self._head_layers()[0](self.decoder(features))
        return logits

    @property
    def logits_stride(self) -> int:
        """Stride of `coarse_logits` in input pixels."""
        return int(getattr(self._head_layers()[1], "scale_factor", 1))

    def _head_layers(self) -> nn.Sequential:
        assert isinstance(self.segmentation_head, nn.Sequential)
        return self.segmentation_head

    def _encode(self, x: Tensor) -> list[Tensor]:
        """Pad the input to a multiple of the output stride and run the encoder."""
        if x.dim() != 4 or x.shape[1] != 3:
            raise ShapeError(f"`x` has shape {list(x.shape)}; expected [B, 3, H, W].")
        if self.training and x.shape[0] == 1 and not self._has_synchronized_batch_norm():
            raise ShapeError(
                "`x` has one image; training needs at least 2, because the ASPP's image pooling is "
                "normalized over the batch. Use a larger batch, or call eval() first."
            )
        stride = self.output_stride
        # Exported programs have no branches; in this form, they know the result as a multiple.
        padded = [(side + stride - 1) // stride * stride for side in x.shape[-2:]]
        pad_h, pad_w = padded[0] - x.shape[-2], padded[1] - x.shape[-1]
        if torch.compiler.is_exporting() or pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        features: list[Tensor] = self.encoder(x)
        return features

    def _has_synchronized_batch_norm(self) -> bool:
        return any(isinstance(module, nn.SyncBatchNorm) for module in self.modules())

    def require_region_head(self) -> RegionHead:
        """Return the region head; raises a ConfigError if the network has none."""
        if self.region_head is None:
            raise ConfigError(
                "This network has no region head, which scores regions (--save regions, "
                "--min-region-score). Train one with --region-head deformable-rfcn."
            )
        return self.region_head

    def deformable_layers(self) -> dict[str, DeformConv2d]:
        """Return the deformable layers by name, in module order (ResNets: execution order)."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, DeformConv2d)
        }


def build_segmenter(config: ModelConfig, num_classes: int) -> Segmenter:
    """Build a segmenter with random weights and zero offsets.

    Raises:
        ConfigError: The encoder is unknown or does not support the configuration.
    """
    encoder = build_encoder(
        config.encoder, output_stride=config.output_stride, depth=config.encoder_depth
    )
    if config.late_dilation:
        dilate_late(encoder, config.late_dilation, name=f"--encoder {config.encoder}")
    make_deformable(
        encoder,
        config.deform_layers,
        offset_groups=config.offset_groups,
        modulated=config.modulated,
        name=f"--encoder {config.encoder}",
    )
    channels: list[int] = encoder.out_channels  # type: ignore[assignment]
    decoder, head = build_decoder(
        config.architecture,
        encoder_channels=channels,
        output_stride=config.output_stride,
        decoder_channels=config.decoder_channels,
        atrous_rates=config.atrous_rates,
        num_classes=num_classes,
    )
    region_head = None
    if config.region_head != "none":  # built last, so that the other weights do not depend on it
        region_head = RegionHead(
            config.region_head,
            encoder_channels=channels,
            output_stride=config.output_stride,
            num_classes=num_classes,
            bins=config.region_bins,
            min_area=config.region_min_area,
        )
    return Segmenter(
        encoder, decoder, head, output_stride=config.output_stride, region_head=region_head
    )
