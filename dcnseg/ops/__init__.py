"""The operators. Each has a definition in plain PyTorch and, where it was built, native code."""

from dcnseg.ops._native import native_status
from dcnseg.ops.deform_conv import DeformConv2d, deform_conv2d
from dcnseg.ops.deform_roi_pool import (
    ROI_OFFSET_BRANCH,
    DeformPSRoIPool,
    DeformRoIPool,
    deform_ps_roi_pool,
    deform_roi_pool,
)
from dcnseg.ops.roi_pool import (
    PSRoIPool,
    RoIAvgPool,
    RoIPool,
    ps_roi_pool,
    roi_avg_pool,
    roi_pool,
)

__all__ = [
    "ROI_OFFSET_BRANCH",
    "DeformConv2d",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "PSRoIPool",
    "RoIAvgPool",
    "RoIPool",
    "deform_conv2d",
    "deform_ps_roi_pool",
    "deform_roi_pool",
    "native_status",
    "ps_roi_pool",
    "roi_avg_pool",
    "roi_pool",
]
