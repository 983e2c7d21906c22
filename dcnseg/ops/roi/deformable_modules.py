"""Deformable RoI pooling that learns its offsets: `DeformRoIPool` and `DeformPSRoIPool`.

Source: Dai et al. 2017, "Deformable Convolutional Networks", figures 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dcnseg.errors import ConfigError, ShapeError
from dcnseg.ops.backend import Backend
from dcnseg.ops.checks import Pair, make_pair, make_pair_or
from dcnseg.ops.roi.checks import (
    MODES,
    PS_MODES,
    SAMPLES_PER_PART,
    Mode,
    check_count,
    check_deformable,
    check_parameters,
    check_product,
    ratio_of_parts,
)
from dcnseg.ops.roi.deformable_pooling import deform_ps_roi_pool, deform_roi_pool

ROI_OFFSET_BRANCH = ".offset_branch."  # in the names of the parameters that predict offsets


class DeformRoIPool(nn.Module):
    """Deformable RoI pooling that learns its offsets from what it pools without them.

    Three fully connected layers, `offset_branch`, turn the box pooled without offsets, in the same
    mode, into normalized offsets, (x, y) for every bin. The last layer starts at zero: the module
    then equals the pooling without offsets. Where a lower learning rate is wanted for the offsets
    (the paper takes 0.01 of the rate for Faster R-CNN), find their parameters by the name:
    `ROI_OFFSET_BRANCH in f".{name}"`.

    Args:
        output_size: As in `deform_roi_pool`.
        spatial_scale: As in `deform_roi_pool`.
        in_channels: Channels C of the input.
        hidden_channels: Outputs of the first two layers.
        gamma: As in `deform_roi_pool`.
        mode: As in `deform_roi_pool`.
        sampling_ratio: As in `deform_roi_pool`.

    Source: Dai et al. 2017, figure 3; the number of layers as in mmcv's DeformRoIPoolPack.
    """

    def __init__(
        self,
        output_size: int | Pair,
        spatial_scale: float,
        in_channels: int,
        *,
        hidden_channels: int = 1024,
        gamma: float = 0.1,
        mode: Mode = "paper",
        sampling_ratio: int = 0,
    ) -> None:
        super().__init__()
        check_deformable(mode, MODES, spatial_scale, gamma, sampling_ratio)
        check_count(in_channels, "in_channels")
        check_count(hidden_channels, "hidden_channels")
        self.output_size = make_pair(output_size, "output_size")
        self.spatial_scale = spatial_scale
        self.gamma = gamma
        self.mode: Mode = mode
        self.sampling_ratio = sampling_ratio
        self.backend: Backend = "auto"
        bins = check_product(self.output_size, "output_size")
        check_parameters(hidden_channels * (in_channels * bins + hidden_channels + 2 * bins))
        last = nn.Linear(hidden_channels, 2 * bins)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.offset_branch = nn.Sequential(
            nn.Linear(in_channels * bins, hidden_channels),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_channels, hidden_channels),
            nn.ReLU(inplace=True),
            last,
        )

    def predict_offset(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Normalized offsets (x, y) of every bin, [R, 2, kh, kw]."""
        pooled = self._pool(input, boxes, None)
        offset: Tensor = self.offset_branch(pooled.flatten(1))
        return offset.view(-1, 2, *self.output_size)

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool [B, C, H, W] to [R, C, kh, kw] with the offsets that `offset_branch` predicts."""
        return self._pool(input, boxes, self.predict_offset(input, boxes))

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale:g}, "
            f"gamma={self.gamma:g}, mode={self.mode}, sampling_ratio={self.sampling_ratio}"
        )

    def _pool(
        self, input: Tensor, boxes: Tensor | Sequence[Tensor], offset: Tensor | None
    ) -> Tensor:
        return deform_roi_pool(
            input,
            boxes,
            offset,
            self.output_size,
            self.spatial_scale,
            self.gamma,
            mode=self.mode,
            sampling_ratio=self.sampling_ratio,
            backend=self.backend,
        )


class DeformPSRoIPool(nn.Module):
    """Deformable position-sensitive RoI pooling that learns its offsets by a convolution.

    The convolution `offset_branch` makes offset fields of the size of the map, [B,
    2*classes*ph*pw, H, W]; pooling them position-sensitively without offsets, in the same mode,
    gives the normalized offsets of every box. It starts at zero: the module then equals the pooling
    without offsets. For a learning rate of its own see `DeformRoIPool`.

    Args:
        output_size: As in `deform_ps_roi_pool`.
        spatial_scale: As in `deform_ps_roi_pool`.
        in_channels: Channels of the map that the offsets are predicted from.
        classes: Classes with offsets of their own; must divide the output channels.
        kernel_size: Of the convolution, odd.
        gamma: As in `deform_ps_roi_pool`.
        group_size: As in `deform_ps_roi_pool`.
        part_size: As in `deform_ps_roi_pool`.
        samples_per_part: As in `deform_ps_roi_pool`.
        mode: As in `deform_ps_roi_pool`.

    Source: Dai et al. 2017, figure 4.
    """

    def __init__(
        self,
        output_size: int | Pair,
        spatial_scale: float,
        in_channels: int,
        *,
        classes: int = 1,
        kernel_size: int = 1,
        gamma: float = 0.1,
        group_size: int | Pair | None = None,
        part_size: int | Pair | None = None,
        samples_per_part: int = SAMPLES_PER_PART,
        mode: Mode = "paper",
    ) -> None:
        super().__init__()
        check_deformable(mode, PS_MODES, spatial_scale, gamma)
        ratio_of_parts(mode, samples_per_part)
        check_count(classes, "classes")
        check_count(in_channels, "in_channels")
        check_count(kernel_size, "kernel_size")
        if kernel_size % 2 == 0:
            raise ConfigError(
                f"`kernel_size` is {kernel_size}; expected an odd number, so that the offset "
                "fields lie where the map lies."
            )
        self.output_size = make_pair(output_size, "output_size")
        self.group_size = make_pair_or(self.output_size, group_size, "group_size")
        self.part_size = make_pair_or(self.output_size, part_size, "part_size")
        self.spatial_scale = spatial_scale
        self.classes = classes
        self.gamma = gamma
        self.samples_per_part = samples_per_part
        self.mode: Mode = mode
        self.backend: Backend = "auto"
        for name in ("output_size", "group_size", "part_size"):
            check_product(getattr(self, name), name)
        fields = 2 * classes * self.part_size[0] * self.part_size[1]
        check_parameters(in_channels * fields * kernel_size**2)
        self.offset_branch = nn.Conv2d(in_channels, fields, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(self.offset_branch.weight)
        assert self.offset_branch.bias is not None
        nn.init.zeros_(self.offset_branch.bias)

    def predict_offset(self, features: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Normalized offsets (x, y) of every part, [R, 2*classes, ph, pw]."""
        fields = self.offset_branch(features)
        return self._pool(fields, boxes, None, self.part_size, self.part_size)

    def forward(
        self,
        input: Tensor,
        boxes: Tensor | Sequence[Tensor],
        features: Tensor | None = None,
    ) -> Tensor:
        """Pool score maps [B, C_out*gh*gw, H, W] to [R, C_out, kh, kw].

        Args:
            input: Score maps.
            boxes: As in `roi_pool`.
            features: Map that the offsets are predicted from, [B, in_channels, H, W]; in the paper
                the one that the score maps are made of. None: `input` itself.
        """
        features = input if features is None else features
        if features.shape[2:] != input.shape[2:]:
            raise ShapeError(
                f"`features` is {list(features.shape)} and `input` {list(input.shape)}; the boxes "
                "mean one place in both, so expected the same height and width."
            )
        offset = self.predict_offset(features, boxes)
        return self._pool(input, boxes, offset, self.output_size, self.group_size)

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale:g}, "
            f"classes={self.classes}, gamma={self.gamma:g}, group_size={self.group_size}, "
            f"part_size={self.part_size}, samples_per_part={self.samples_per_part}, "
            f"mode={self.mode}"
        )

    def _pool(
        self,
        input: Tensor,
        boxes: Tensor | Sequence[Tensor],
        offset: Tensor | None,
        output_size: Pair,
        group_size: Pair,
    ) -> Tensor:
        return deform_ps_roi_pool(
            input,
            boxes,
            offset,
            output_size,
            self.spatial_scale,
            self.gamma,
            group_size=group_size,
            part_size=self.part_size,
            samples_per_part=self.samples_per_part,
            mode=self.mode,
            backend=self.backend,
        )
