"""Time the RoI operators on the CPU, beside torchvision's where it has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torchvision.ops
from torch import Tensor

from benchmarks.common import (
    OURS,
    Operator,
    Report,
    Timing,
    describe_machine,
    make_parser,
    relative_error,
    time_passes,
)
from dcnseg.ops import (
    deform_ps_roi_pool,
    deform_roi_pool,
    native_status,
    ps_roi_pool,
    roi_avg_pool,
    roi_pool,
)

BINS = 7  # along either side of a region
IMAGE_HW = (800, 1024)  # what the boxes are drawn in
GAMMA = 0.1


@dataclass(frozen=True)
class Setting:
    """A map, and the regions that are pooled from it."""

    size_hw: tuple[int, int]
    channels: int
    classes: int  # output channels of the position-sensitive operators
    regions: int

    @property
    def scale(self) -> float:
        return self.size_hw[0] / IMAGE_HW[0]


@dataclass(frozen=True)
class Case:
    """An operator of ours and those shown beside it; what a yardstick computes is not the same."""

    name: str
    ours: Operator
    is_position_sensitive: bool = False
    offsets_of: Literal["nothing", "pixels", "lengths"] = "nothing"  # what they are relative to
    rivals: Mapping[str, Operator] | None = None
    yardsticks: Mapping[str, Operator] | None = None

    @property
    def contenders(self) -> dict[str, Operator]:
        return {OURS: self.ours, **(self.rivals or {}), **(self.yardsticks or {})}


SETTINGS = (Setting((50, 64), 256, 10, 300), Setting((100, 128), 256, 10, 300))
QUICK_SETTINGS = (Setting((25, 32), 8, 1, 5),)


def make_cases(scale: float) -> tuple[Case, ...]:
    """All operators, for boxes that `scale` takes from the image to the map."""
    fixed: dict[str, Any] = {"output_size": BINS, "spatial_scale": scale}
    deformable = fixed | {"gamma": GAMMA}
    their: Any = torchvision.ops
    roi_align = partial(_without_offset, their.roi_align, sampling_ratio=2, aligned=True, **fixed)
    ps_roi_align = partial(_without_offset, their.ps_roi_align, sampling_ratio=4, **fixed)
    return (
        Case(
            "roi_pool",
            partial(roi_pool, **fixed),
            rivals={"torchvision": partial(their.roi_pool, **fixed)},
        ),
        Case(
            "roi_avg_pool",
            partial(roi_avg_pool, **fixed),
            yardsticks={"torchvision roi_align": roi_align},
        ),
        Case(
            "ps_roi_pool",
            partial(ps_roi_pool, **fixed),
            is_position_sensitive=True,
            rivals={"torchvision": partial(their.ps_roi_pool, **fixed)},
        ),
        Case(
            "deform_roi_pool paper",
            partial(deform_roi_pool, mode="paper", **deformable),
            offsets_of="pixels",
            yardsticks={"torchvision roi_align": roi_align},
        ),
        Case(
            "deform_roi_pool mmcv, 2x2 samples",
            partial(deform_roi_pool, mode="mmcv", sampling_ratio=2, **deformable),
            offsets_of="lengths",
            yardsticks={"torchvision roi_align, 2x2 samples": roi_align},
        ),
        Case(
            "deform_ps_roi_pool paper",
            partial(deform_ps_roi_pool, mode="paper", **deformable),
            is_position_sensitive=True,
            offsets_of="pixels",
            yardsticks={"torchvision ps_roi_align, 4x4": ps_roi_align},
        ),
    )


def _without_offset(
    operator: Operator, input: Tensor, boxes: Tensor, offset: Tensor | None = None, **fixed: Any
) -> Tensor:
    return operator(input, boxes, **fixed)


def make_boxes(setting: Setting) -> Tensor:
    """Boxes [R, 5] of all sizes up to half the image, at least two pixels of the map within it.

    Their sides are whole pixels of the map that a division by the bins, and the product that
    follows, leave whole in float32 and in float64: so the bins are the same in both, and a result
    can be compared with the exact one.
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
    """Of the side with and without its last pixel: operators differ in what they count."""
    sizes = torch.tensor([side, side + 1])
    exact = (sizes.to(dtype) / BINS * BINS == sizes for dtype in (torch.float32, torch.float64))
    return all(bool(each.all()) for each in exact)


def make_inputs(case: Case, setting: Setting, boxes: Tensor) -> tuple[Tensor, ...]:
    """Input, boxes and, for a deformable operator, offsets."""
    torch.manual_seed(0)
    per_bin = case.is_position_sensitive
    channels = setting.classes * BINS * BINS if per_bin else setting.channels
    input = torch.randn(1, channels, *setting.size_hw)
    if case.offsets_of == "nothing":
        return input, boxes
    sides = (boxes[:, 3:] - boxes[:, 1:3]) * setting.scale
    return input, boxes, make_offset(sides + 1 if case.offsets_of == "pixels" else sides)


def make_offset(sides: Tensor) -> Tensor:
    """Offsets [R, 2, kh, kw] for regions whose width and height count as `sides`, [R, 2].

    They move bins by odd sixteenths of a pixel, next to what a normal distribution gave. So no
    sample lies on a pixel, where the derivative jumps, and float32 and float64 take the same side.
    """
    unit = GAMMA * sides[:, :, None, None]
    pixels = torch.randn(sides.shape[0], 2, BINS, BINS) * unit
    return ((8 * pixels).floor() + 0.5) / 8 / unit


def run_backward(operator: Operator, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Output and gradients of input and offsets."""
    input, boxes, *offsets = inputs
    leaves = [tensor.detach().requires_grad_() for tensor in (input, *offsets)]
    output = operator(leaves[0], boxes, *leaves[1:])
    output.backward(torch.ones_like(output))
    return output.detach(), *(leaf.grad for leaf in leaves)


def validate(case: Case, inputs: tuple[Tensor, ...]) -> None:
    """Compare ours and the rivals with the reference in float64, gradients and all."""
    reference = partial(case.ours, backend="reference")
    truths = run_backward(reference, tuple(tensor.double() for tensor in inputs))
    for name, operator in {OURS: case.ours, **(case.rivals or {})}.items():
        for result, truth in zip(run_backward(operator, inputs), truths, strict=True):
            assert result is not None
            assert truth is not None
            error = relative_error(result, truth)
            if not error < 1e-4:
                raise SystemExit(f"{case.name} of {name} is wrong: relative error {error:.2g}")


def measure(case: Case, inputs: tuple[Tensor, ...], rounds: int) -> dict[str, dict[str, Timing]]:
    """Timings by pass and contender."""
    validate(case, inputs)
    return time_passes(case.contenders, run_backward, inputs, rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report = Report(
        f"RoI operators, {BINS}x{BINS} bins, float32, channels-first",
        {**describe_machine(), "native": native_status()["cpu"]},
        {},
        as_json=options.json,
    )
    for setting in QUICK_SETTINGS if options.quick else SETTINGS:
        torch.manual_seed(0)
        boxes = make_boxes(setting)
        for case in make_cases(setting.scale):
            inputs = make_inputs(case, setting, boxes)
            subject = f"{case.name} {list(inputs[0].shape)} {setting.regions} boxes"
            for passed, timings in measure(case, inputs, options.rounds).items():
                report.add(subject, passed, timings)
    report.finish()


if __name__ == "__main__":
    main()
