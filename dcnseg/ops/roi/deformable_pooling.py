"""Functional interface of deformable RoI pooling: `deform_roi_pool`, `deform_ps_roi_pool`.

The channels of offsets are (x, y), as in the code of the paper and in mmcv, whereas they are
(dy, dx) in `dcnseg.ops.deform_conv`, as in torchvision.

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
    to_sampling_ratio,
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
    """Deformable RoI pooling: average pooling of bins that are displaced by offsets.

    Note:
        The channels of `offset` are (x, y), not (dy, dx) as in `deform_conv2d`: channel 0 moves
        bins to the right, channel 1 moves them down.

    The modes differ in the samples of a bin and at the border of the map:

    - "paper": the samples are the pixels of the bins of `roi_avg_pool`, displaced. The map is
      surrounded by zeros, with which samples within one pixel of the border are interpolated.
      Equals `roi_avg_pool` without offsets.
    - "mmcv": equals mmcv.ops.deform_roi_pool. Corners are not rounded, but moved by half a pixel.
      A bin is divided into `sampling_ratio` parts along each axis, or into parts of at most one
      pixel if it is 0, and sampled at their centers. The border is replicated up to one pixel
      outside the map; samples further out are zero.
    - "mxnet": equals the code published with the paper. Corners are rounded before scaling, and the
      end is part of the box. A bin is divided into `sampling_ratio` parts along each axis, or 4 if
      it is 0, and sampled at their starts. The border is replicated up to half a pixel outside the
      map; samples further out are excluded from the mean.

    A bin without samples gives 0. A box with a NaN or infinite coordinate gives NaN, as does a bin
    with such an offset. Positions are computed in at least float32. `boxes` gets no gradient. Under
    autocast nothing is cast; `boxes` and `offset` may always differ from `input` in dtype.

    Args:
        input: Input map, [B, C, H, W].
        boxes: As in `roi_pool`, [R, 5] or a list of [Ri, 4].
        offset: Normalized offsets (x, y) of the bins, [R, 2, kh, kw]. A bin moves by `gamma` times
            its offset times the (width, height) of its box. None: no offsets.
        output_size: Number of bins (kh, kw) per box, or one integer for both.
        spatial_scale: Pixels of `input` per pixel of the image, such as 1/16 for an output stride
            of 16. Above 0.
        gamma: Factor of all offsets. With 0.1, an offset of 1 moves a bin by a tenth of its box.
        mode: "paper", "mmcv" or "mxnet", see above.
        sampling_ratio: Number of samples of a bin along each axis, 0 to 65536; 0: as the mode
            defines. Must be 0 in mode "paper".
        backend: As in `roi_pool`.

    Returns:
        [R, C, kh, kw] in the dtype and memory format of `input`.

    Raises:
        ShapeError: A shape, dtype, device or batch index is wrong, or the output does not fit in
            memory. Under torch.compile and CUDA graph capture, a wrong batch index gives NaN.
        ConfigError: `mode`, `backend` or a number is out of its range.
        NativeOpsError: `backend` is "native" and the native operator is not available.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", eq. 6.
    """
    output_size = make_pair(output_size, "output_size")
    check_deformable(mode, MODES, spatial_scale, gamma, sampling_ratio)
    if isinstance(offset, Tensor) and offset.dim() == 4 and offset.shape[1] != 2:
        raise ShapeError(
            f"`offset` has {offset.shape[1]} channels; deform_roi_pool expects 2, (x, y) of every "
            "bin."
        )
    sizes = (output_size, (1, 1), output_size)
    settings = (mode, spatial_scale, sampling_ratio, gamma)
    return _pool("deform_roi_pool", backend, input, boxes, offset, sizes, settings)


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
    """Deformable position-sensitive RoI pooling: each group of bins has its own channels.

    Note:
        The channels of `offset` are (x, y), not (dy, dx) as in `deform_conv2d`.

    Bin (i, j) of output channel c reads input channel (c*gh + i*gh//kh)*gw + j*gw//kw and is
    displaced by the offset of part (i*ph//kh, j*pw//kw) of class c*classes//C_out. The rest is as
    in `deform_roi_pool`.

    Args:
        input: Score maps, [B, C_out*gh*gw, H, W].
        boxes: As in `roi_pool`.
        offset: Normalized offsets of every part for every class, (x, y) interleaved,
            [R, 2*classes, ph, pw], in the unit of `deform_roi_pool`. The number of classes must
            divide C_out. None: no offsets.
        output_size: Number of bins (kh, kw) per box, or one integer for both.
        spatial_scale: As in `deform_roi_pool`.
        gamma: As in `deform_roi_pool`.
        group_size: Number of channel groups (gh, gw). None: `output_size`.
        part_size: Number of parts (ph, pw) per box with their own offsets. None: `output_size`.
        samples_per_part: Number of samples of a bin along each axis in mode "mxnet", 1 to 65536.
            Must be the default in mode "paper", which samples every pixel.
        mode: "paper" or "mxnet", as in `deform_roi_pool`. "mxnet" equals MXNet's
            DeformablePSROIPooling, with which published weights were trained.
        backend: As in `roi_pool`.

    Returns:
        [R, C_out, kh, kw] in the dtype and memory format of `input`.

    Raises:
        ShapeError: As in `deform_roi_pool`, or the channels of `input` are not divisible
            by gh*gw.
        ConfigError: As in `deform_roi_pool`.
        NativeOpsError: As in `deform_roi_pool`.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", section 2.2, "Position-Sensitive
    (PS) RoI Pooling".
    """
    output_size = make_pair(output_size, "output_size")
    groups = make_pair_or(output_size, group_size, "group_size")
    parts = make_pair_or(output_size, part_size, "part_size")
    check_deformable(mode, PS_MODES, spatial_scale, gamma)
    settings = (mode, spatial_scale, to_sampling_ratio(mode, samples_per_part), gamma)
    sizes = (output_size, groups, parts)
    return _pool("deform_ps_roi_pool", backend, input, boxes, offset, sizes, settings)


def _pool(
    operator: str,
    backend: Backend,
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    sizes: tuple[Pair, Pair, Pair],
    settings: tuple[Mode, float, int, float],
) -> Tensor:
    """Check the tensors, compute the samples of all boxes and their shifts in pixels, and pool."""
    output_size, groups, parts = sizes
    mode, spatial_scale, sampling_ratio, gamma = settings
    check_regions(input, boxes)
    channels = check_groups(input, groups, "group_size")
    check_output(input, boxes, output_size, channels)
    check_batch_indices(boxes, input.shape[0])
    check_product(parts, "part_size")
    check_offset(offset, input, boxes, parts, channels)
    native = use_native(operator, backend, (input, offset), deform_roi_pool_self_test)
    regions = locate_regions(boxes, input)
    size_hw = (input.shape[2], input.shape[3])
    samples, size = make_samples(mode, regions, output_size, spatial_scale, size_hw, sampling_ratio)
    shift = None if offset is None else make_shift(offset, size, gamma)
    run = deform_roi_pool_native if native else deform_roi_pool_reference
    return run(input, samples, shift, output_size, groups, mode)
