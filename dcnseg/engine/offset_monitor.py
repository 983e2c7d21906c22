"""Statistics of the offsets that a network predicts; the entry point is `OffsetMonitor`."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any, Self

from torch import Tensor

from dcnseg.models.segmenter import Segmenter
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.ops.offset_stats import OffsetStatistics, offset_statistics

MONITORED_PASSES = 8  # enough for a mean; more would slow down the evaluation
MAX_OUTSIDE_SHARE = 0.5  # of the sampling positions
ADVICE = (
    "Ignore this in the first hundred steps, where batch norm statistics are not yet stable; "
    "later, lower --offset-lr-scale or --lr, or choose another --encoder."
)


class OffsetMonitor:
    """Records the offsets of the deformable layers in the first forward passes in its context.

    with OffsetMonitor(model) as monitor:
        evaluate(...)
    monitor.summary()  # {"encoder.layer4.2.conv2": {"mean_px": 0.7, ...}}
    """

    def __init__(self, model: Segmenter) -> None:
        self._layers = model.deformable_layers()
        self._seen: dict[str, list[OffsetStatistics]] = defaultdict(list)
        self._sizes_px: dict[str, int] = {}  # the longer side of each layer's largest map
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Start recording."""
        for name, layer in self._layers.items():
            hook = partial(self._record, name, layer)
            self._handles.append(layer.conv_offset.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Each layer's statistics, averaged over the recorded passes; None if not finite."""
        return {
            name: {
                field: _mean([getattr(entry, field) for entry in self._seen[name]])
                for field in ("mean_px", "p95_px", "outside_share", "grid_outside_share")
            }
            for name in self._layers
            if self._seen[name]
        }

    def runaways(self) -> dict[str, str]:
        """A warning for each layer that samples far outside its feature map, by layer name."""
        return {
            name: f"{name}: {reason} {ADVICE}"
            for name in self._layers
            if self._seen[name] and (reason := _runaway(self._seen[name], self._sizes_px[name]))
        }

    def _record(
        self, name: str, layer: DeformConv2d, _module: object, inputs: Any, offset: Tensor
    ) -> None:
        if len(self._seen[name]) < MONITORED_PASSES:
            height, width = inputs[0].shape[-2:]
            self._sizes_px[name] = max(height, width, self._sizes_px.get(name, 0))
            self._seen[name].append(offset_statistics(layer, offset, (height, width)))


def _runaway(seen: list[OffsetStatistics], size_px: int) -> str | None:
    """Explain why the offsets are too large, if they are; NaN counts as too large."""
    p95_px, outside, grid_outside = (
        sum(getattr(entry, name) for entry in seen) / len(seen)
        for name in ("p95_px", "outside_share", "grid_outside_share")
    )
    if not p95_px <= size_px:
        return (
            f"the 95th percentile of its offsets is {p95_px:.0f} px, but its feature map is only "
            f"{size_px} px long."
        )
    # On a small feature map, a dilated kernel is mostly outside even without offsets.
    if outside > max(MAX_OUTSIDE_SHARE, grid_outside):
        return f"a fraction of {outside:.2f} of its samples lies outside its feature map."
    return None


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values)
    return round(mean, 5) if abs(mean) < float("inf") else None
