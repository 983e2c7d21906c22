"""Functional interface of RoI pooling: `roi_pool`, `roi_avg_pool`, `ps_roi_pool`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dcnseg.ops.backend import Backend, use_native
from dcnseg.ops.checks import Pair, check_choice, make_pair
from dcnseg.ops.roi.checks import (
    CORNERS,
    Corners,
    check_batch_indices,
    check_groups,
    check_output,
    check_regions,
    check_scale_and_gamma,
)
from dcnseg.ops.roi.geometry import locate_regions, make_bins
from dcnseg.ops.roi.native import (
    roi_avg_pool_native,
    roi_avg_pool_self_test,
    roi_pool_native,
    roi_pool_self_test,
)
from dcnseg.ops.roi.reference import roi_avg_pool_reference, roi_pool_reference


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Pair,
    spatial_scale: float = 1.0,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """RoI max pooling of Fast R-CNN.

    Corners are rounded to pixels, half away from zero. The end is inclusive, and a box is at least
    one pixel wide and high. A bin contains every pixel that it overlaps, so that adjacent bins may
    share rows and columns, and is clipped to the map. An empty bin gives 0. The gradient goes to
    the first maximum of a bin in row-major order. NaN counts as the maximum. Equals
    torchvision.ops.roi_pool, which however ignores NaN and values below -3e38.

    A box with a NaN or infinite coordinate gives NaN. Positions are computed in at least float32.
    `boxes` gets no gradient. Under autocast nothing is cast; `boxes` may always differ from `input`
    in dtype.

    Args:
        input: Input map, [B, C, H, W].
        boxes: [R, 5] with the columns batch index, x1, y1, x2, y2, or a list with one [Ri, 4]
            tensor x1, y1, x2, y2 per image. In pixels of the image, see `spatial_scale`.
        output_size: Number of bins (kh, kw) per box, or one integer for both.
        spatial_scale: Pixels of `input` per pixel of the image, such as 1/16 for an output stride
            of 16. Above 0.
        backend: "native", "reference" (PyTorch) or "auto", which uses the native operator if it is
            available for the device of the tensors, and otherwise the reference with a warning.

    Returns:
        [R, C, kh, kw] in the dtype and memory format of `input`.

    Raises:
        ShapeError: A shape, dtype, device or batch index is wrong, or the output does not fit in
            memory. Under torch.compile and CUDA graph capture, a wrong batch index gives NaN.
        ConfigError: `backend` or `spatial_scale` is out of its range.
        NativeOpsError: `backend` is "native" and the native operator is not available.

    Source: Girshick 2015, "Fast R-CNN", section 2.1.
    """
    bins, output_size = _check_and_make_bins(input, boxes, output_size, spatial_scale)
    native = use_native("roi_pool", backend, (input,), roi_pool_self_test)
    run = roi_pool_native if native else roi_pool_reference
    return run(input, bins, output_size)


def roi_avg_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Pair,
    spatial_scale: float = 1.0,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """RoI average pooling.

    The bins are those of `roi_pool`. The mean is over the pixels of a bin that are on the map.

    Args:
        input: As in `roi_pool`.
        boxes: As in `roi_pool`.
        output_size: As in `roi_pool`.
        spatial_scale: As in `roi_pool`.
        backend: As in `roi_pool`.

    Returns:
        [R, C, kh, kw] in the dtype and memory format of `input`.

    Raises:
        ShapeError: As in `roi_pool`.
        ConfigError: As in `roi_pool`.
        NativeOpsError: As in `roi_pool`.

    Source: Dai et al. 2017, "Deformable Convolutional Networks", eq. 5.
    """
    bins, output_size = _check_and_make_bins(input, boxes, output_size, spatial_scale)
    native = use_native("roi_avg_pool", backend, (input,), roi_avg_pool_self_test)
    run = roi_avg_pool_native if native else roi_avg_pool_reference
    return run(input, bins, output_size)


def ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Pair,
    spatial_scale: float = 1.0,
    *,
    corners: Corners = "torchvision",
    backend: Backend = "auto",
) -> Tensor:
    """Position-sensitive RoI average pooling of R-FCN: each bin has its own channels.

    Bin (i, j) of output channel c reads input channel (c*kh + i)*kw + j. A bin contains every pixel
    that it overlaps and is clipped to the map. An empty bin gives 0.

    Args:
        input: Score maps, [B, C_out*kh*kw, H, W].
        boxes: As in `roi_pool`.
        output_size: As in `roi_pool`.
        spatial_scale: As in `roi_pool`.
        corners: How corners are rounded.
            "torchvision": after scaling, with an exclusive end and a size of at least one pixel.
            Equals torchvision.ops.ps_roi_pool except for the last row and column of the map, which
            the forward of torchvision excludes, but not its backward.
            "rfcn": before scaling, with an inclusive end and a size of at least 0.1 pixels, as in
            the code published with R-FCN.
        backend: As in `roi_pool`.

    Returns:
        [R, C_out, kh, kw] in the dtype and memory format of `input`.

    Raises:
        ShapeError: As in `roi_pool`, or the channels of `input` are not divisible by kh*kw.
        ConfigError: As in `roi_pool`, or `corners` is not one of the values above.
        NativeOpsError: As in `roi_pool`.

    Source: Dai et al. 2016, "R-FCN", eq. 1.
    """
    check_choice(corners, "corners", CORNERS)
    bins, output_size = _check_and_make_bins(input, boxes, output_size, spatial_scale, corners)
    native = use_native("ps_roi_pool", backend, (input,), roi_avg_pool_self_test)
    run = roi_avg_pool_native if native else roi_avg_pool_reference
    return run(input, bins, output_size, output_size)


def _check_and_make_bins(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Pair,
    spatial_scale: float,
    corners: Corners | None = None,
) -> tuple[Tensor, Pair]:
    """Check the arguments and return the bins of all boxes and (kh, kw).

    If `corners` is given, each bin has its own channels.
    """
    pair = make_pair(output_size, "output_size")
    check_scale_and_gamma(spatial_scale)
    check_regions(input, boxes)
    channels = input.shape[1] if corners is None else check_groups(input, pair, "output_size")
    check_output(input, boxes, pair, channels)
    check_batch_indices(boxes, input.shape[0])
    regions = locate_regions(boxes, input)
    size_hw = (input.shape[2], input.shape[3])
    return make_bins(regions, pair, spatial_scale, size_hw, corners), pair
