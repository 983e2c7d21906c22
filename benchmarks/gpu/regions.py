"""The RoI operators on a GPU, beside torchvision's where it has them.

Entry point: `bench_regions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_roi
from benchmarks.common import OURS, Operator, alternate
from benchmarks.gpu.timing import GpuClock


def bench_regions(device: torch.device, *, rounds: int, quick: bool) -> Iterator[dict[str, Any]]:
    """One row for each RoI operator, map and pass, in float32."""
    settings = bench_roi.QUICK_SETTINGS if quick else bench_roi.SETTINGS
    clock = GpuClock(device, calls=2 if quick else 10)
    for setting in settings:
        torch.manual_seed(0)
        boxes = bench_roi.make_boxes(setting)
        for case in bench_roi.make_cases(setting.scale):
            inputs = tuple(t.to(device) for t in bench_roi.make_inputs(case, setting, boxes))
            bench_roi.validate(case, inputs)
            backward = {
                name: partial(bench_roi.run_backward, operator, inputs)
                for name, operator in case.contenders.items()
            }
            forward = {
                name: partial(_pool_without_gradient, operator, inputs)
                for name, operator in case.contenders.items()
            }
            for passed, calls in (("forward", forward), ("forward+backward", backward)):
                timings = alternate(calls, rounds, clock)
                yield {
                    "subject": f"{case.name} {list(inputs[0].shape)} {setting.regions} boxes",
                    "pass": passed,
                    "contenders": {
                        name: {
                            "milliseconds": timing.median,
                            "spread": timing.spread,
                            "ratio": timing.ratio_to(timings[OURS]),
                        }
                        for name, timing in timings.items()
                    },
                }


def _pool_without_gradient(operator: Operator, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return operator(*inputs)
