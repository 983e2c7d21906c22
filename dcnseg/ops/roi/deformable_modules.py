"""Deformable RoI pooling that predicts its offsets: `DeformRoIPool` and `DeformPSRoIPool`.

Source: Dai et al. 2017, "Deformable Convolutional Networks", figures 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dcnseg.errors import ConfigError, ShapeError
from dcnseg.ops.backend import Backend
from dcnseg.ops.checks import Pair, make_pair, make_pair_or
from dcnseg.ops.deform_conv.module import zero_parameters
from dcnseg.ops.roi.checks import (
    MODES,
    PS_MODES,
    SAMPLES_PER_PART,
    Mode,
    check_count,
    check_deformable,
    check_parameters,
    check_product,
    to_sampling_ratio,
)
from dcnseg.ops.roi.deformable_pooling import deform_ps_roi_pool, deform_roi_pool

ROI_OFFSET_BRANCH = ".offset_branch."  # part of the names of parameters that predict offsets


class DeformRoIPool(nn.Module):
    """Deformable RoI pooling that predicts its offsets from the pooled features.

    `offset_branch`, three fully connected layers, predicts the normalized offsets (x, y) of every
    bin from the box pooled without offsets in the same mode. Its last layer is initialized to zero,
    so that the module initially equals pooling without offsets. To give the offset branch a lower
    learning rate (the paper uses a factor of 0.01 for Faster R-CNN), select its parameters with
    `ROI_OFFSET_BRANCH in f".{name}"`.

    The attribute `backend`, "auto" by default, is passed to `deform_roi_pool`.

    Shape:
        - Input: [B, C, H, W] and boxes as in `roi_pool`.
        - Output: [R, C, kh, kw].

    Args:
        output_size: As in `deform_roi_pool`.
        spatial_scale: As in `deform_roi_pool`.
        in_channels: Number of input channels C.
        hidden_channels: Number of outputs of the first two layers.
        gamma: As in `deform_roi_pool`.
        mode: As in `deform_roi_pool`.
        sampling_ratio: As in `deform_roi_pool`.

    Raises:
        ShapeError: A size is out of its range, or the parameters do not fit in memory.
        ConfigError: Another argument is out of its range.

    Source: Dai et al. 2017, figure 3. The number of layers is that of mmcv's DeformRoIPoolPack.
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
        zero_parameters(last)
        self.offset_branch = nn.Sequential(
            nn.Linear(in_channels * bins, hidden_channels),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_channels, hidden_channels),
            nn.ReLU(inplace=True),
            last,
        )

    def predict_offset(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Predict the normalized offsets (x, y) of every bin, [R, 2, kh, kw]."""
        pooled = self._pool(input, boxes, None)
        offset: Tensor = self.offset_branch(pooled.flatten(1))
        return offset.view(-1, 2, *self.output_size)

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Pool [B, C, H, W] to [R, C, kh, kw] with the predicted offsets."""
        return self._pool(input, boxes, self.predict_offset(input, boxes))

    def extra_repr(self) -> str:
        """Show the arguments."""
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
    """Deformable position-sensitive RoI pooling that predicts its offsets with a convolution.

    `offset_branch`, a convolution, predicts offset maps [B, 2*classes*ph*pw, H, W]. The normalized
    offsets of a box are these maps after position-sensitive pooling without offsets in the same
    mode. The convolution is initialized to zero, so that the module initially equals pooling
    without offsets. See `DeformRoIPool` for its learning rate.

    The attribute `backend`, "auto" by default, is passed to `deform_ps_roi_pool`.

    Shape:
        - Input: score maps [B, C_out*gh*gw, H, W] and boxes as in `roi_pool`.
        - Output: [R, C_out, kh, kw].

    Args:
        output_size: As in `deform_ps_roi_pool`.
        spatial_scale: As in `deform_ps_roi_pool`.
        in_channels: Number of channels of the map from which the offsets are predicted.
        classes: Number of classes with their own offsets; must divide C_out.
        kernel_size: Kernel size of the convolution, an odd integer.
        gamma: As in `deform_ps_roi_pool`.
        group_size: As in `deform_ps_roi_pool`.
        part_size: As in `deform_ps_roi_pool`.
        samples_per_part: As in `deform_ps_roi_pool`.
        mode: As in `deform_ps_roi_pool`.

    Raises:
        ShapeError: A size is out of its range, or the parameters do not fit in memory.
        ConfigError: Another argument is out of its range.

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
        to_sampling_ratio(mode, samples_per_part)
        check_count(classes, "classes")
        check_count(in_channels, "in_channels")
        check_count(kernel_size, "kernel_size")
        if kernel_size % 2 == 0:
            raise ConfigError(
                f"`kernel_size` is {kernel_size}; expected an odd integer, so that the offset maps "
                "have the size of the input."
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
        offset_channels = 2 * classes * self.part_size[0] * self.part_size[1]
        check_parameters(in_channels * offset_channels * kernel_size**2)
        self.offset_branch = nn.Conv2d(
            in_channels, offset_channels, kernel_size, padding=kernel_size // 2
        )
        zero_parameters(self.offset_branch)

    def predict_offset(self, features: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Predict the normalized offsets (x, y) of every part, [R, 2*classes, ph, pw]."""
        offset_maps = self.offset_branch(features)
        return self._pool(offset_maps, boxes, None, self.part_size, self.part_size)

    def forward(
        self,
        input: Tensor,
        boxes: Tensor | Sequence[Tensor],
        features: Tensor | None = None,
    ) -> Tensor:
        """Pool score maps [B, C_out*gh*gw, H, W] to [R, C_out, kh, kw].

        Args:
            input: Score maps, [B, C_out*gh*gw, H, W].
            boxes: As in `roi_pool`.
            features: Map from which the offsets are predicted, [B, in_channels, H, W]. In the paper
                it is the map from which the score maps are computed. None: `input`.

        Raises:
            ShapeError: As in `deform_ps_roi_pool`, or the sizes of `features` and `input` differ.
        """
        features = input if features is None else features
        if features.shape[2:] != input.shape[2:]:
            raise ShapeError(
                f"`features` has the shape {list(features.shape)} and `input` the shape "
                f"{list(input.shape)}; expected the same height and width."
            )
        offset = self.predict_offset(features, boxes)
        return self._pool(input, boxes, offset, self.output_size, self.group_size)

    def extra_repr(self) -> str:
        """Show the arguments."""
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
