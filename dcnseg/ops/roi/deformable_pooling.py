"""Deformable RoI pooling with offsets that are given: `deform_roi_pool`, `deform_ps_roi_pool`.

The offsets' channels are (x, y) here, as in the code of the paper and in mmcv, and (dy, dx) in
`dcnseg.ops.deform_conv`, as in torchvision.

Source: Dai et al. 2017, "Deformable Convolutional Networks", section 2.2 and figures 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dcnseg.errors import ShapeError
from dcnseg.ops.backend import Backend, use_native
from dcnseg.ops.checks import Pair, make_pair, make_pair_or
from dcnseg.ops.roi.checks import (
    MODES,
    PS_MODES,
    SAMPLES_PER_PART,
    Mode,
    check_batch_indices,
    check_deformable,
    check_groups,
    check_offset,
    check_output,
    check_product,
    check_regions,
    ratio_of_parts,
)
from dcnseg.ops.roi.deformable_reference import deform_roi_pool_reference
from dcnseg.ops.roi.geometry import locate_regions, make_samples, make_shift
from dcnseg.ops.roi.native import deform_roi_pool_native, deform_roi_pool_self_test


def deform_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: int | Pair,
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
        spatial_scale: Pixels of `input` per pixel of the image; 1/16 for a stride of 16.
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
    check_deformable(mode, MODES, spatial_scale, gamma, sampling_ratio)
    check_regions(input, boxes)
    check_output(input, boxes, output_size, input.shape[1])
    check_batch_indices(boxes, input.shape[0])
    if isinstance(offset, Tensor) and offset.dim() == 4 and offset.shape[1] != 2:
        raise ShapeError(
            f"`offset` has {offset.shape[1]} channels; deform_roi_pool takes 2, x and y of every "
            "bin."
        )
    check_offset(offset, input, boxes, output_size, input.shape[1])
    tensors = (input, offset)
    native = use_native("deform_roi_pool", backend, tensors, deform_roi_pool_self_test)
    return _pool(
        native,
        input,
        boxes,
        offset,
        output_size,
        (1, 1),
        spatial_scale,
        gamma,
        mode,
        sampling_ratio,
    )


def deform_ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: int | Pair,
    spatial_scale: float = 1.0,
    gamma: float = 0.1,
    *,
    group_size: int | Pair | None = None,
    part_size: int | Pair | None = None,
    samples_per_part: int = SAMPLES_PER_PART,
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
            pixel, and knows the default alone.
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
    groups = make_pair_or(output_size, group_size, "group_size")
    parts = make_pair_or(output_size, part_size, "part_size")
    check_deformable(mode, PS_MODES, spatial_scale, gamma)
    sampling_ratio = ratio_of_parts(mode, samples_per_part)
    check_regions(input, boxes)
    channels = check_groups(input, groups, "group_size")
    check_output(input, boxes, output_size, channels)
    check_batch_indices(boxes, input.shape[0])
    check_product(parts, "part_size")
    check_offset(offset, input, boxes, parts, channels)
    tensors = (input, offset)
    native = use_native("deform_ps_roi_pool", backend, tensors, deform_roi_pool_self_test)
    return _pool(
        native,
        input,
        boxes,
        offset,
        output_size,
        groups,
        spatial_scale,
        gamma,
        mode,
        sampling_ratio,
    )


def _pool(
    native: bool,
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: Pair,
    groups: Pair,
    spatial_scale: float,
    gamma: float,
    mode: Mode,
    sampling_ratio: int,
) -> Tensor:
    """Lay out the samples of all boxes and their shifts in pixels, and pool."""
    regions = locate_regions(boxes, input)
    size_hw = (input.shape[2], input.shape[3])
    samples, size = make_samples(mode, regions, output_size, spatial_scale, size_hw, sampling_ratio)
    shift = None if offset is None else make_shift(offset, size, gamma)
    run = deform_roi_pool_native if native else deform_roi_pool_reference
    return run(input, samples, shift, output_size, groups, mode)
