"""Deformable RoI pooling: `deform_roi_pool`, `deform_ps_roi_pool`, and modules that learn offsets.

The offsets' channels are (x, y) here, as in the code of the paper and in mmcv, and (dy, dx) in
`dcnseg.ops.deform_conv`, as in torchvision.

Source: Dai et al. 2017, "Deformable Convolutional Networks", section 2.2 and figures 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor, nn

from dcnseg.errors import ConfigError, ShapeError
from dcnseg.ops.backend import Backend, takes_native
from dcnseg.ops.roi_checks import (
    Mode,
    check_choice,
    check_count,
    check_groups,
    check_numbers,
    check_offset,
    check_regions,
    make_pair,
)
from dcnseg.ops.roi_geometry import locate_regions, make_samples, make_shift
from dcnseg.ops.roi_native import deform_roi_pool_native, deform_roi_pool_self_test
from dcnseg.ops.roi_reference import deform_roi_pool_reference

_Pair: TypeAlias = tuple[int, int]

ROI_OFFSET_BRANCH = ".offset_branch."  # in the names of the parameters that predict offsets

_MODES: tuple[Mode, ...] = ("paper", "mmcv", "mxnet")
_PS_MODES: tuple[Mode, ...] = ("paper", "mxnet")


def deform_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: int | _Pair,
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
    *,
    mode: Mode = "paper",
    sampling_ratio: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Take the mean of every bin of every box, each bin displaced by an offset of its own.

    THE CHANNELS OF `offset` ARE (x, y), NOT (dy, dx) AS IN `deform_conv2d`: channel 0 moves bins to
    the right, channel 1 down.

    The modes differ in where a bin samples and in what lies at the edge of the map:

    - "paper": every pixel of the bins of `roi_avg_pool` is a sample. Beyond the map are zeros, to
      which samples fade over one pixel. No offset gives `roi_avg_pool`.
    - "mmcv": as mmcv.ops.deform_roi_pool. Corners are not rounded but moved by half a pixel.
      Samples lie in the middles of `sampling_ratio` parts of a bin along each axis, or of as many
      as it is pixels large. Up to one pixel beyond the map they read the pixel at its edge, then
      zero.
    - "mxnet": as the code published with the paper. Corners are rounded before they are scaled, the
      end is part of the box. Samples lie at the beginnings of `sampling_ratio` (or 4) parts of a
      bin along each axis; those more than half a pixel beyond the map are left out of the mean,
      others read the pixel at its edge.

    A bin without samples gives 0. A box with a NaN or infinite coordinate, or a bin with such an
    offset, gives NaN and reads nothing. Positions are computed in float32 at least. Boxes get no
    gradient. Autocast changes nothing: boxes and offsets may have another dtype than `input` at any
    time, and the output has that of `input`.

    Args:
        input: Map to pool, [B, C, H, W].
        boxes: As in `roi_pool`: [R, 5], or for every image [Ri, 4].
        offset: Displacement of every bin, (x, y), in widths and heights of its box by `gamma`,
            [R, 2, kh, kw]. None: zero.
        output_size: Bins (kh, kw) of a box, or one number for both.
        spatial_scale: Pixels of `input` per pixel of the picture; 1/16 for a stride of 16.
        gamma: Factor of all offsets: at 0.1 an offset of 1 moves a bin by a tenth of its box.
        mode: "paper", "mmcv" or "mxnet", see above.
        sampling_ratio: Samples of a bin along each axis; 0 as the mode has it. "paper" knows 0
            alone.
        backend: As in `roi_pool`.

    Returns:
        [R, C, kh, kw] in the dtype and memory format of `input`.

    Raises:
        ShapeError: A shape, dtype or device is wrong, or a batch index names no image (under
            torch.compile and CUDA graph capture such a box gives NaN instead).
        ConfigError: `mode`, `backend` or a number is out of its range.
        NativeOpsError: `backend="native"`, and there is no native code for this device.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", eq. 6.
    """
    output_size = make_pair(output_size, "output_size")
    _check_settings(mode, _MODES, spatial_scale, gamma, sampling_ratio)
    check_regions(input, boxes)
    if isinstance(offset, Tensor) and offset.dim() == 4 and offset.shape[1] != 2:
        raise ShapeError(
            f"`offset` has {offset.shape[1]} channels; deform_roi_pool takes 2, x and y of every "
            "bin."
        )
    samples, shift = _lay_out(
        input,
        boxes,
        offset,
        input.shape[1],
        output_size,
        output_size,
        spatial_scale,
        gamma,
        mode,
        sampling_ratio,
    )
    tensors = (input, offset)
    native = takes_native("deform_roi_pool", backend, tensors, deform_roi_pool_self_test)
    run = deform_roi_pool_native if native else deform_roi_pool_reference
    return run(input, samples, shift, output_size, (1, 1), mode)


def deform_ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: int | _Pair,
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
    *,
    group_size: int | _Pair | None = None,
    part_size: int | _Pair | None = None,
    samples_per_part: int = 4,
    mode: Mode = "paper",
    backend: Backend = "auto",
) -> Tensor:
    """Take the mean of every displaced bin of every box, each group of bins from its own channels.

    THE CHANNELS OF `offset` ARE (x, y), NOT (dy, dx) AS IN `deform_conv2d`.

    Bin (i, j) of output channel c reads input channel (c*gh + i*gh//kh)*gw + j*gw//kw and is
    displaced by part (i*ph//kh, j*pw//kw) of class c*classes//C_out. All else is as in
    `deform_roi_pool`.

    Args:
        input: Score maps, [B, C_out*gh*gw, H, W].
        boxes: As in `roi_pool`.
        offset: Displacement of every part for every class, (x, y) interleaved, in widths and
            heights of its box by `gamma`, [R, 2*classes, ph, pw]; the number of classes divides
            C_out. None: zero.
        output_size: Bins (kh, kw) of a box, or one number for both.
        spatial_scale: As in `deform_roi_pool`.
        gamma: As in `deform_roi_pool`.
        group_size: Groups of channels (gh, gw); None: as `output_size`.
        part_size: Parts of a box with an offset of their own, (ph, pw); None: as `output_size`.
        samples_per_part: Samples of a bin along each axis in the mode "mxnet"; "paper" takes every
            pixel.
        mode: "paper" or "mxnet", as in `deform_roi_pool`. "mxnet" equals
            MXNet's DeformablePSROIPooling, which published weights were trained with.
        backend: As in `roi_pool`.

    Returns:
        [R, C_out, kh, kw] in the dtype and memory format of `input`.

    Raises:
        ShapeError: As in `deform_roi_pool`, or gh*gw does not divide the channels of `input`.
        ConfigError: As in `deform_roi_pool`.
        NativeOpsError: As in `deform_roi_pool`.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", section 2.2, "Position-Sensitive
    (PS) RoI Pooling".
    """
    output_size = make_pair(output_size, "output_size")
    groups = _pair_or(output_size, group_size, "group_size")
    parts = _pair_or(output_size, part_size, "part_size")
    check_count(samples_per_part, "samples_per_part", 1)
    sampling_ratio = samples_per_part if mode == "mxnet" else 0
    _check_settings(mode, _PS_MODES, spatial_scale, gamma, sampling_ratio)
    check_regions(input, boxes)
    samples, shift = _lay_out(
        input,
        boxes,
        offset,
        check_groups(input, groups, "group_size"),
        output_size,
        parts,
        spatial_scale,
        gamma,
        mode,
        sampling_ratio,
    )
    tensors = (input, offset)
    native = takes_native("deform_ps_roi_pool", backend, tensors, deform_roi_pool_self_test)
    run = deform_roi_pool_native if native else deform_roi_pool_reference
    return run(input, samples, shift, output_size, groups, mode)


def _pair_or(default: _Pair, value: int | _Pair | None, name: str) -> _Pair:
    return default if value is None else make_pair(value, name)


def _check_settings(
    mode: str, modes: Sequence[str], spatial_scale: float, gamma: float, sampling_ratio: int
) -> None:
    check_choice(mode, "mode", modes)
    check_numbers(spatial_scale, gamma)
    check_count(sampling_ratio, "sampling_ratio", 0)
    if mode == "paper" and sampling_ratio:
        raise ConfigError(
            f'`sampling_ratio` is {sampling_ratio}; the mode "paper" samples every pixel and takes '
            '0 alone. Choose the mode "mmcv" or "mxnet".'
        )


def _lay_out(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    out_channels: int,
    output_size: _Pair,
    part_size: _Pair,
    spatial_scale: float,
    gamma: float,
    mode: Mode,
    sampling_ratio: int,
) -> tuple[Tensor, Tensor | None]:
    """The samples of all boxes and their shifts in pixels; checks the offset."""
    regions = locate_regions(boxes, input)
    samples, size = make_samples(
        mode,
        regions,
        output_size,
        spatial_scale,
        (input.shape[2], input.shape[3]),
        sampling_ratio,
    )
    if offset is None:
        return samples, None
    check_offset(offset, input, regions.image.shape[0], part_size, out_channels)
    return samples, make_shift(offset, size, gamma)


class DeformRoIPool(nn.Module):
    """Deformable RoI pooling that learns its offsets from what it pools without them.

    Three fully connected layers, `offset_branch`, turn the box pooled without offsets, in the same
    mode, into normalised offsets, (x, y) for every bin. The last layer starts at zero: the module
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
        output_size: int | _Pair,
        spatial_scale: float,
        in_channels: int,
        *,
        hidden_channels: int = 1024,
        gamma: float = 0.1,
        mode: Mode = "paper",
        sampling_ratio: int = 0,
    ) -> None:
        super().__init__()
        _check_settings(mode, _MODES, spatial_scale, gamma, sampling_ratio)
        check_count(in_channels, "in_channels", 1)
        check_count(hidden_channels, "hidden_channels", 1)
        self.output_size = make_pair(output_size, "output_size")
        self.spatial_scale = spatial_scale
        self.gamma = gamma
        self.mode: Mode = mode
        self.sampling_ratio = sampling_ratio
        self.backend: Backend = "auto"
        bins = self.output_size[0] * self.output_size[1]
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
        """Normalised offsets (x, y) of every bin, [R, 2, kh, kw]."""
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
    gives the normalised offsets of every box. It starts at zero: the module then equals the pooling
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
        output_size: int | _Pair,
        spatial_scale: float,
        in_channels: int,
        *,
        classes: int = 1,
        kernel_size: int = 1,
        gamma: float = 0.1,
        group_size: int | _Pair | None = None,
        part_size: int | _Pair | None = None,
        samples_per_part: int = 4,
        mode: Mode = "paper",
    ) -> None:
        super().__init__()
        _check_settings(mode, _PS_MODES, spatial_scale, gamma, 0)
        check_count(classes, "classes", 1)
        check_count(samples_per_part, "samples_per_part", 1)
        check_count(in_channels, "in_channels", 1)
        check_count(kernel_size, "kernel_size", 1)
        if kernel_size % 2 == 0:
            raise ConfigError(
                f"`kernel_size` is {kernel_size}; expected an odd number, so that the offset "
                "fields lie where the map lies."
            )
        self.output_size = make_pair(output_size, "output_size")
        self.group_size = _pair_or(self.output_size, group_size, "group_size")
        self.part_size = _pair_or(self.output_size, part_size, "part_size")
        self.spatial_scale = spatial_scale
        self.classes = classes
        self.gamma = gamma
        self.samples_per_part = samples_per_part
        self.mode: Mode = mode
        self.backend: Backend = "auto"
        fields = 2 * classes * self.part_size[0] * self.part_size[1]
        self.offset_branch = nn.Conv2d(in_channels, fields, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(self.offset_branch.weight)
        assert self.offset_branch.bias is not None
        nn.init.zeros_(self.offset_branch.bias)

    def predict_offset(self, features: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
        """Normalised offsets (x, y) of every part, [R, 2*classes, ph, pw]."""
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
        output_size: _Pair,
        group_size: _Pair,
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
