"""Time the RoI operators on the CPU, with torchvision's beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torchvision.ops
from torch import Tensor

from benchmarks.common import OURS, Comparison, Inputs, Operator, make_parser, report
from dcnseg.ops import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool, roi_avg_pool, roi_pool

BINS = 7  # along either side of a region
IMAGE_HW = (800, 1024)  # the boxes lie in an image of this size
GAMMA = 0.1
RIVALS = ("roi_pool", "ps_roi_pool")  # torchvision has the same operator


@dataclass(frozen=True)
class Setting:
    """A feature map and the number of regions pooled from it."""

    size_hw: tuple[int, int]
    channels: int
    classes: int  # output channels of the position-sensitive operators
    regions: int

    @property
    def scale(self) -> float:
        return self.size_hw[0] / IMAGE_HW[0]


@dataclass(frozen=True)
class Case:
    """An operator, torchvision's counterparts, and yardsticks that compute something similar."""

    name: str
    operator: Operator
    rivals: Mapping[str, Operator] = field(default_factory=dict)
    yardsticks: Mapping[str, Operator] = field(default_factory=dict)
    offset_unit: Literal["", "pixels", "lengths"] = ""  # what offsets are relative to, if any

    @property
    def is_position_sensitive(self) -> bool:
        return "ps_roi" in self.name


SETTINGS = (Setting((50, 64), 256, 10, 300), Setting((100, 128), 256, 10, 300))
QUICK_SETTINGS = (Setting((25, 32), 8, 1, 5),)


def make_cases(scale: float) -> tuple[Case, ...]:
    """Return all operators, for boxes that `scale` maps from the image to the feature map."""
    fixed: dict[str, Any] = {"output_size": BINS, "spatial_scale": scale}
    deformable = fixed | {"gamma": GAMMA}
    their: Any = torchvision.ops
    align = partial(_without_offset, their.roi_align, sampling_ratio=2, aligned=True, **fixed)
    ps_align = partial(_without_offset, their.ps_roi_align, sampling_ratio=4, **fixed)
    paper = partial(deform_roi_pool, mode="paper", **deformable)
    mmcv = partial(deform_roi_pool, mode="mmcv", sampling_ratio=2, **deformable)
    ps_paper = partial(deform_ps_roi_pool, mode="paper", **deformable)
    theirs = {name: {"torchvision": partial(getattr(their, name), **fixed)} for name in RIVALS}
    align_2x2 = {"torchvision roi_align, 2x2 samples": align}
    align_4x4 = {"torchvision ps_roi_align, 4x4": ps_align}
    roi_align = {"torchvision roi_align": align}
    return (
        Case("roi_pool", partial(roi_pool, **fixed), theirs["roi_pool"]),
        Case("roi_avg_pool", partial(roi_avg_pool, **fixed), {}, roi_align),
        Case("ps_roi_pool", partial(ps_roi_pool, **fixed), theirs["ps_roi_pool"]),
        Case("deform_roi_pool paper", paper, {}, roi_align, "pixels"),
        Case("deform_roi_pool mmcv, 2x2 samples", mmcv, {}, align_2x2, "lengths"),
        Case("deform_ps_roi_pool paper", ps_paper, {}, align_4x4, "pixels"),
    )


def _without_offset(
    operator: Operator, input: Tensor, boxes: Tensor, offset: Tensor | None = None, **fixed: Any
) -> Tensor:
    return operator(input, boxes, **fixed)


def make_comparisons(*, quick: bool, device: torch.device | str = "cpu") -> Iterator[Comparison]:
    """Yield a comparison for each feature map and operator."""
    for setting in QUICK_SETTINGS if quick else SETTINGS:
        torch.manual_seed(0)
        boxes = make_boxes(setting)
        for case in make_cases(setting.scale):
            inputs = tuple(each.to(device) for each in make_inputs(case, setting, boxes))
            yield Comparison(
                f"{case.name} {list(inputs[0].shape)} {setting.regions} boxes",
                inputs,
                partial(case.operator, backend="reference"),
                {OURS: case.operator, **case.rivals},
                case.yardsticks,
            )


def make_boxes(setting: Setting) -> Tensor:
    """Draw boxes [R, 5] of all sizes up to half the image, two pixels inside the feature map.

    Their sides are whole pixels of the feature map that stay whole in float32 and float64 when
    divided and multiplied by the number of bins. The bins are then the same in both dtypes, and
    results can be compared.
    """
    sides = [side for side in range(3, max(setting.size_hw) // 2) if _has_exact_bins(side)]
    columns = []
    for size in setting.size_hw:
        fitting = torch.tensor([side for side in sides if side <= size - 5])
        side = fitting[torch.randint(len(fitting), (setting.regions,))]
        start = 2 + (torch.rand(setting.regions) * (size - 4 - side)).floor()
        columns += [start / setting.scale, (start + side) / setting.scale]
    y1, y2, x1, x2 = columns
    return torch.stack([torch.zeros_like(x1), x1, y1, x2, y2], dim=1)


def _has_exact_bins(side: int) -> bool:
    """Test the side with and without its last pixel, because operators differ in counting it."""
    sizes = torch.tensor([side, side + 1])
    exact = (sizes.to(dtype) / BINS * BINS == sizes for dtype in (torch.float32, torch.float64))
    return all(bool(each.all()) for each in exact)


def make_inputs(case: Case, setting: Setting, boxes: Tensor) -> Inputs:
    """Return input, boxes and, for a deformable operator, offsets."""
    torch.manual_seed(0)
    channels = setting.classes * BINS**2 if case.is_position_sensitive else setting.channels
    input = torch.randn(1, channels, *setting.size_hw).requires_grad_()
    if not case.offset_unit:
        return input, boxes
    sides = (boxes[:, 3:] - boxes[:, 1:3]) * setting.scale
    offset = make_offset(sides + 1 if case.offset_unit == "pixels" else sides)
    return input, boxes, offset.requires_grad_()


def make_offset(sides: Tensor) -> Tensor:
    """Draw offsets [R, 2, kh, kw] for regions with the widths and heights `sides` [R, 2].

    They are normally distributed and then move bins by odd sixteenths of a pixel. No sample lies on
    a pixel, where the derivative jumps and float32 and float64 could differ.
    """
    unit = GAMMA * sides[:, :, None, None]
    pixels = torch.randn(sides.shape[0], 2, BINS, BINS) * unit
    return ((8 * pixels).floor() + 0.5) / 8 / unit


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser(__doc__, rounds=9).parse_args(arguments)
    torch.set_num_threads(options.threads)
    title = f"RoI operators, {BINS}x{BINS} bins, float32, channels-first"
    report(title, make_comparisons(quick=options.quick), options)


if __name__ == "__main__":
    main()
