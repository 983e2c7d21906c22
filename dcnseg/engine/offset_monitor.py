"""Statistics of the offsets that a network predicts while it is evaluated."""

from __future__ import annotations

from collections import defaultdict
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from dcnseg.models.segmenter import Segmenter
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.ops.offset_stats import OffsetStatistics, offset_statistics

MONITORED_BATCHES = 8  # enough for a mean; more would only slow the evaluation
MOST = 0.5  # share of samples
ADVICE = (
    "In the first hundred steps batch normalization may not have settled, which passes; otherwise "
    "lower --offset-lr-scale or --lr, or choose another --encoder."
)


class OffsetMonitor:
    """While entered, watches the first forward passes of a network's deformable layers.

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
        """Start watching."""
        for name, layer in self._layers.items():
            self._handles.append(
                layer.conv_offset.register_forward_hook(
                    lambda _module, inputs, output, name=name, layer=layer: self._note(
                        name, layer, inputs[0], output
                    )
                )
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def summary(self) -> dict[str, dict[str, float | None]]:
        """Mean over the watched passes of each layer's statistics; None where not finite."""
        return {
            name: {
                field: _mean([getattr(entry, field) for entry in self._seen[name]])
                for field in ("mean_px", "p95_px", "outside_share", "grid_outside_share")
            }
            for name in self._layers
            if self._seen[name]
        }

    def runaways(self) -> dict[str, str]:
        """A warning for each layer whose offsets lead nowhere, by the layer's name."""
        return {
            name: f"{name}: {reason} {ADVICE}"
            for name in self._layers
            if self._seen[name] and (reason := _runaway(self._seen[name], self._sizes_px[name]))
        }

    def _note(self, name: str, layer: DeformConv2d, x: Tensor, offset: Tensor) -> None:
        if len(self._seen[name]) < MONITORED_BATCHES:
            height, width = x.shape[-2:]
            self._sizes_px[name] = max(height, width, self._sizes_px.get(name, 0))
            self._seen[name].append(offset_statistics(layer, offset, (height, width)))


def _runaway(seen: list[OffsetStatistics], size_px: int) -> str | None:
    """Why these offsets have run away, if they have; a NaN has."""
    p95_px = sum(entry.p95_px for entry in seen) / len(seen)
    outside = sum(entry.outside_share for entry in seen) / len(seen)
    grid_outside = sum(entry.grid_outside_share for entry in seen) / len(seen)
    if not p95_px <= size_px:
        return (
            f"the 95th percentile of its offsets is {p95_px:.0f} px, and its map is only "
            f"{size_px} px long."
        )
    # A dilated grid on a small map is mostly outside without any offsets.
    if outside > max(MOST, grid_outside):
        return f"{outside:.0%} of its samples lie outside its map."
    return None


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values)
    return round(mean, 5) if abs(mean) < float("inf") else None
