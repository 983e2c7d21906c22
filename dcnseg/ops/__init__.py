"""Deformable convolution and RoI pooling operators.

Each operator has a PyTorch reference implementation and, where it was built, a native one.
"""

from typing import Final

from dcnseg.ops._native import native_status
from dcnseg.ops.deform_conv.functional import deform_conv2d
from dcnseg.ops.deform_conv.module import OFFSET_BRANCH, DeformConv2d
from dcnseg.ops.roi.deformable_modules import ROI_OFFSET_BRANCH, DeformPSRoIPool, DeformRoIPool
from dcnseg.ops.roi.deformable_pooling import deform_ps_roi_pool, deform_roi_pool
from dcnseg.ops.roi.modules import PSRoIPool, RoIAvgPool, RoIPool
from dcnseg.ops.roi.pooling import ps_roi_pool, roi_avg_pool, roi_pool

OFFSET_BRANCHES: Final = (OFFSET_BRANCH, ROI_OFFSET_BRANCH)
"""A parameter predicts offsets if one of these is in `f".{name}"`."""

__all__ = [
    "OFFSET_BRANCH",
    "OFFSET_BRANCHES",
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
