"""The region head of R-FCN: the class and the refined box of each region of an image.

Entry points: `build_region_head`, `encode_boxes` and `decode_boxes`.

Source: Dai et al. 2016, "R-FCN", section 2, and Dai et al. 2017, "Deformable Convolutional
Networks", section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcnseg.ops.roi.deformable_modules import DeformPSRoIPool, DeformRoIPool
from dcnseg.ops.roi.modules import PSRoIPool

STRIDE: Final = 8  # of the map that regions are pooled from, in pixels of the network input
MAP_CHANNELS: Final = 128
HIDDEN_CHANNELS: Final = 256  # of the fully connected layers
NUM_DELTAS: Final = 4
OFFSET_GAMMA: Final = 0.1
# The layers that depend on the classes.
CLASS_LAYERS: Final = (
    *("votes.score_maps", "votes.pool.offset_branch"),
    "votes.layers.4",  # of FullyConnected
)
# The scale of box refinements as trained, as in Fast R-CNN: otherwise their loss is tiny.
DELTA_SCALE: Final = (0.1, 0.1, 0.2, 0.2)
# The largest refinement is 62.5 times the side of the box, which keeps exp() finite.
MAX_LOG_SCALE: Final = 4.135


class RegionOutput(NamedTuple):
    """What the region head computes for R regions.

    Attributes:
        logits: Of the K classes and, last, of "no object", float32 [R, K + 1].
        deltas: Refinement of the box for `decode_boxes`, float32 [R, 4].
    """

    logits: Tensor
    deltas: Tensor


class RegionHead(nn.Module):
    """Pools the features of each region and classifies it.

    Attributes:
        pooling: "rfcn", "deformable-rfcn" or "deformable-fc".
        num_classes: K.
        bins: k; a region has k x k bins.
        min_area: Area of the smallest region in pixels of the network input.
    """

    def __init__(
        self,
        pooling: str,
        *,
        encoder_channels: Sequence[int],
        output_stride: int,
        num_classes: int,
        bins: int,
        min_area: int,
    ) -> None:
        super().__init__()
        self.pooling, self.num_classes, self.bins = pooling, num_classes, bins
        self.min_area = min_area
        self.reduce = _build_1x1(encoder_channels[-1], MAP_CHANNELS)
        # Stride 16 is too coarse for small objects; the map of stride 8 adds detail.
        has_detail = output_stride > STRIDE
        self.detail = _build_1x1(encoder_channels[3], MAP_CHANNELS) if has_detail else None
        self.votes: PositionSensitiveVotes | FullyConnected
        if pooling == "deformable-fc":
            self.votes = FullyConnected(num_classes + 1 + NUM_DELTAS, bins)
        else:
            is_deformable = pooling == "deformable-rfcn"
            self.votes = PositionSensitiveVotes(num_classes, bins, is_deformable=is_deformable)

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the map that regions are pooled from.

        Args:
            features: The feature maps of the encoder, starting with the input.

        Returns:
            [B, C, h, w], of stride 8.
        """
        fused: Tensor = self.reduce(features[-1])
        if self.detail is not None:
            detail: Tensor = self.detail(features[3])
            size = detail.shape[-2:]
            # Aligned at the corners, as in the decoder: strides keep the first pixel.
            fused = detail + F.interpolate(fused, size=size, mode="bilinear", align_corners=True)
        return F.relu(fused)

    def forward(self, fused: Tensor, boxes: Sequence[Tensor]) -> RegionOutput:
        """Compute the logits and the refinement of each region.

        Args:
            fused: The result of `fuse`, [B, C, h, w].
            boxes: The regions of each of the B images, (left, top, right, bottom) in pixels of the
                network input, [Ri, 4].
        """
        # In 16 bits, the sum over a bin would be rounded.
        with torch.autocast(fused.device.type, enabled=False):
            if fused.dtype in (torch.bfloat16, torch.float16):
                fused = fused.float()
            outputs: Tensor = self.votes(fused, boxes)
        return RegionOutput(*outputs.split([self.num_classes + 1, NUM_DELTAS], dim=1))


class PositionSensitiveVotes(nn.Module):
    """Position-sensitive maps of the classes and of the box, averaged over the bins of a region.

    With offsets, each of the K + 1 + 4 outputs has its own.
    """

    def __init__(self, num_classes: int, bins: int, *, is_deformable: bool) -> None:
        super().__init__()
        outputs = num_classes + 1 + NUM_DELTAS
        self.score_maps = _build_1x1(MAP_CHANNELS, (num_classes + 1) * bins**2, std=0.01)
        self.box_maps = _build_1x1(MAP_CHANNELS, NUM_DELTAS * bins**2, std=0.01)
        self.pool: DeformPSRoIPool | PSRoIPool = PSRoIPool(bins, 1 / STRIDE)
        if is_deformable:
            self.pool = DeformPSRoIPool(
                bins, 1 / STRIDE, MAP_CHANNELS, classes=outputs, gamma=OFFSET_GAMMA
            )

    def forward(self, fused: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Return the mean over the bins of each region, [R, K + 1 + 4]."""
        maps = torch.cat([self.score_maps(fused), self.box_maps(fused)], dim=1)
        if isinstance(self.pool, DeformPSRoIPool):
            pooled: Tensor = self.pool(maps, end_inclusive(boxes), fused)
        else:
            pooled = self.pool(maps, boxes)  # [R, K + 1 + 4, k, k]
        return pooled.mean(dim=(2, 3))


class FullyConnected(nn.Module):
    """Deformable RoI pooling and two fully connected layers, as in Fast R-CNN."""

    def __init__(self, outputs: int, bins: int) -> None:
        super().__init__()
        self.pool = DeformRoIPool(
            bins, 1 / STRIDE, MAP_CHANNELS, hidden_channels=HIDDEN_CHANNELS, gamma=OFFSET_GAMMA
        )
        last = nn.Linear(HIDDEN_CHANNELS, outputs)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            nn.Linear(MAP_CHANNELS * bins**2, HIDDEN_CHANNELS),
            nn.ReLU(inplace=True),
            nn.Linear(HIDDEN_CHANNELS, HIDDEN_CHANNELS),
            nn.ReLU(inplace=True),
            last,
        )

    def forward(self, fused: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Return the outputs of each region, [R, outputs]."""
        outputs: Tensor = self.layers(self.pool(fused, end_inclusive(boxes)).flatten(1))
        return outputs


def _build_1x1(in_channels: int, out_channels: int, std: float | None = None) -> nn.Conv2d:
    """A 1x1 convolution with zero biases and normal weights, or those for a ReLU after it."""
    layer = nn.Conv2d(in_channels, out_channels, 1)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    if std is None:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    else:
        nn.init.normal_(layer.weight, std=std)
    return layer


def end_inclusive(boxes: Sequence[Tensor]) -> list[Tensor]:
    """Move the ends of boxes by one pixel of the map, for deformable pooling.

    There, the end of a box is part of it. Without offsets it then equals plain pooling.
    """
    return [each - each.new_tensor([0, 0, STRIDE, STRIDE]) for each in boxes]


def encode_boxes(boxes: Tensor, targets: Tensor) -> Tensor:
    """Compute the refinements that turn boxes into their targets; the inverse of `decode_boxes`.

    Args:
        boxes: (left, top, right, bottom), [R, 4], with positive sides.
        targets: The same for each box, [R, 4].

    Returns:
        [R, 4]: the shift of the center in sides of the box, and the logarithm of the factors of the
        sides, divided by DELTA_SCALE.

    Source: Girshick et al. 2014, "Rich feature hierarchies", appendix C.
    """
    centers, sides = _to_centers(boxes)
    target_centers, target_sides = _to_centers(targets)
    deltas = torch.cat([(target_centers - centers) / sides, (target_sides / sides).log()], dim=1)
    return deltas / deltas.new_tensor(DELTA_SCALE)


def decode_boxes(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Apply refinements to boxes.

    Args:
        boxes: (left, top, right, bottom), [R, 4].
        deltas: As in `RegionOutput`, [R, 4].

    Returns:
        The refined boxes, [R, 4]; they may exceed the image.
    """
    centers, sides = _to_centers(boxes)
    shift, log_scale = (deltas * deltas.new_tensor(DELTA_SCALE)).split(2, dim=1)
    centers = centers + shift * sides
    half = sides * log_scale.clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([centers - half, centers + half], dim=1)


def _to_centers(boxes: Tensor) -> tuple[Tensor, Tensor]:
    start, end = boxes.split(2, dim=1)
    return (start + end) / 2, end - start
