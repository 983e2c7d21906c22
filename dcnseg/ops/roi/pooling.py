"""Pooling of regions of interest (RoIs): `roi_pool`, `roi_avg_pool`, `ps_roi_pool`.

Sources: Girshick 2015, "Fast R-CNN", section 2.1; Dai et al. 2017, "Deformable Convolutional
Networks", eq. 5; Dai et al. 2016, "R-FCN", eq. 1.
"""

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
    check_numbers,
    check_output,
    check_regions,
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
    """Take the largest value of every bin of every box.

    Corners are rounded to pixels, half away from zero, and the last pixel belongs to the box, which
    is at least one pixel large. Bins take in every pixel that they touch, so neighbors share rows
    and columns, and are clipped to the map; a bin outside of it gives 0. Of several largest values
    the first one, row by row, gets the gradient; NaN counts as the largest. As
    torchvision.ops.roi_pool, which loses NaN and, below -3e38, everything.

    A box with a NaN or infinite coordinate gives NaN and reads nothing. Positions are computed in
    float32 at least. Boxes get no gradient. Autocast changes nothing: the boxes may have another
    dtype than `input` at any time, and the output has that of `input`.

    Args:
        input: Map to pool, [B, C, H, W].
        boxes: Batch index, x1, y1, x2, y2 of every box, [R, 5], or for every image of the batch
            its boxes x1, y1, x2, y2, [Ri, 4]. In pixels of the image (see `spatial_scale`).
        output_size: Bins (kh, kw) of a box, or one number for both.
        spatial_scale: Pixels of `input` per pixel of the image; 1/16 for a stride of 16.
        backend: "native" or "reference" code, or "auto": native where it was built for the
            tensors' device, else the PyTorch code with one warning that gives the reason.

    Returns:
        [R, C, kh, kw] in the dtype and memory format of `input`.

    Raises:
        ShapeError: A shape, dtype or device is wrong, or a batch index names no image (under
            torch.compile and CUDA graph capture such a box gives NaN instead).
        ConfigError: `backend` or `spatial_scale` is out of its range.
        NativeOpsError: `backend="native"`, and there is no native code for this device.

    Source: Girshick 2015, "Fast R-CNN", section 2.1.
    """
    bins, output_size = _check_and_lay_out(input, boxes, output_size, spatial_scale)
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
    """Take the mean of every bin of every box.

    The bins are those of `roi_pool`; the mean is over the pixels that are left of a bin when it is
    clipped to the map.

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
    bins, output_size = _check_and_lay_out(input, boxes, output_size, spatial_scale)
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
    """Take the mean of every bin of every box, each bin from channels of its own.

    Bin (i, j) of output channel c reads input channel (c*kh + i)*kw + j. Bins take in every pixel
    that they touch and are clipped to the map; a bin outside of it gives 0.

    Args:
        input: Score maps, [B, C_out*kh*kw, H, W].
        boxes: As in `roi_pool`.
        output_size: As in `roi_pool`.
        spatial_scale: As in `roi_pool`.
        corners: How corners are read. "torchvision": rounded once scaled, the end is not part of
            the box, which is at least one pixel large; equals torchvision.ops.ps_roi_pool but at
            the last row and column of the map, where torchvision's forward leaves them out and its
            backward does not. "rfcn": rounded before they are scaled, the end is part of the box,
            which is at least 0.1 pixels large, as in the code published with R-FCN.
        backend: As in `roi_pool`.

    Returns:
        [R, C_out, kh, kw] in the dtype and memory format of `input`.

    Raises:
        ShapeError: As in `roi_pool`, or kh*kw does not divide the channels of `input`.
        ConfigError: As in `roi_pool`, or `corners` is none of those above.
        NativeOpsError: As in `roi_pool`.

    Source: Dai et al. 2016, "R-FCN", eq. 1.
    """
    check_choice(corners, "corners", CORNERS)
    bins, output_size = _check_and_lay_out(input, boxes, output_size, spatial_scale, corners)
    native = use_native("ps_roi_pool", backend, (input,), roi_avg_pool_self_test)
    run = roi_avg_pool_native if native else roi_avg_pool_reference
    return run(input, bins, output_size, output_size)


def _check_and_lay_out(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Pair,
    spatial_scale: float,
    corners: Corners | None = None,
) -> tuple[Tensor, Pair]:
    """Check the arguments; the bins of all boxes, and the pair (kh, kw).

    With `corners` each bin has channels of its own.
    """
    pair = make_pair(output_size, "output_size")
    check_numbers(spatial_scale)
    check_regions(input, boxes)
    channels = input.shape[1] if corners is None else check_groups(input, pair, "output_size")
    check_output(input, boxes, pair, channels)
    check_batch_indices(boxes, input.shape[0])
    regions = locate_regions(boxes, input)
    size_hw = (input.shape[2], input.shape[3])
    return make_bins(regions, pair, spatial_scale, size_hw, corners), pair
