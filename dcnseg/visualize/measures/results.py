"""The measures of the offsets of a network over a data set: `OffsetMeasures`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from dcnseg.visualize.measures.sums import HIGH_MASK, LOW_MASK, OffsetShares

DEAD_PX: Final = 0.05  # pixels of the layer's input map
RUNAWAY_SHARE: Final = 0.5  # of the sampling points; as the warning during training

# Where the labels come from.
MASKS: Final = "masks"
PREDICTIONS: Final = "predictions"

# What groups locations; the distance is that from the border of the object.
ALL, SIZE, CLASS, DISTANCE = "all", "size", "class", "distance"
EVERYWHERE, OBJECTS = "all", "objects"  # the groups of ALL


@dataclass(frozen=True)
class Dilation:
    """The effective dilation over locations: mean and standard deviation; NaN without any.

    Attributes:
        px: Mean, in pixels of the image.
        deviation_px: Standard deviation over the locations.
        relative: Mean of the dilation divided by that of the plain grid; 1 without offsets.
        relative_deviation: Its standard deviation.
    """

    px: float
    deviation_px: float
    relative: float
    relative_deviation: float


@dataclass(frozen=True)
class OnObject:
    """The share of sampling points on the object of their center; NaN without any.

    Attributes:
        own: With the learned offsets.
        plain: With the plain grid.
        shuffled: With the offsets of random other locations of the same image.
        modulated: With the learned offsets, each point weighted by its modulation; NaN for layers
            without modulation.
    """

    own: float
    plain: float
    shuffled: float
    modulated: float


@dataclass(frozen=True)
class GroupMeasures:
    """The measures over the locations of a group, which are counted by `locations`."""

    locations: int
    dilation: Dilation
    on_object: OnObject


Groups = Mapping[str, Mapping[str, GroupMeasures]]


@dataclass(frozen=True)
class Modulation:
    """The modulation of a layer, in [0, 2].

    Attributes:
        mean: Over all taps and locations.
        tap_means: Of each tap, by offset group, [G][T].
        low_share: Share below 0.1.
        high_share: Share above 1.9.
    """

    mean: float
    tap_means: tuple[tuple[float, ...], ...]
    low_share: float
    high_share: float


@dataclass(frozen=True)
class LayerMeasures:
    """The measures of a deformable layer.

    Attributes:
        name: The layer's name in the network.
        plain_dilation_px: Effective dilation of the plain grid in image pixels, mean over images.
        groups: Measures of groups of locations, by what groups them (`ALL`, `SIZE`, `CLASS`,
            `DISTANCE`) and by name.
        outside_share: Share of the sampling points outside the image.
        plain_outside_share: The same of the plain grid.
        rms_offset_map_px: Root mean square length of the offsets, in pixels of the input map.
        mean_offset_map_px: Mean offset (dy, dx) of each tap by offset group, [G][T][2].
        shares: What the squared length of the offsets consists of.
        modulation: None without modulation.
        rank_correlation: Of the effective dilation with the area of the object, over all objects;
            NaN where one of them is constant.
        not_finite_share: Share of the locations that are left out, because an offset or the
            modulation is NaN or infinite.
    """

    name: str
    plain_dilation_px: float
    groups: Groups
    outside_share: float
    plain_outside_share: float
    rms_offset_map_px: float
    mean_offset_map_px: tuple[tuple[tuple[float, float], ...], ...]
    shares: OffsetShares
    modulation: Modulation | None
    rank_correlation: float
    not_finite_share: float

    @property
    def is_dead(self) -> bool:
        """Whether the offsets never moved: their root mean square length is below `DEAD_PX`."""
        return self.rms_offset_map_px < DEAD_PX

    @property
    def is_runaway(self) -> bool:
        """Whether most sampling points are outside the image, and more than of the plain grid."""
        return self.outside_share > max(RUNAWAY_SHARE, self.plain_outside_share)


@dataclass(frozen=True)
class CascadeMeasures:
    """The measures of the last deformable layers together.

    Attributes:
        layers: Their names, in forward order.
        groups: As of a layer; the dilation is NaN.
        outside_share: Share of the paths' ends outside the image.
        plain_outside_share: The same of the plain grids.
    """

    layers: tuple[str, ...]
    groups: Groups
    outside_share: float
    plain_outside_share: float


@dataclass(frozen=True)
class FieldRadius:
    """The effective receptive field of a class in image pixels: medians over `pixels` pixels.

    Attributes:
        pixels: Number of pixels of the class whose gradient was computed.
        half_px: Radius that contains 50 % of the gradient.
        most_px: Radius that contains 90 %.
        zeroed_half_px: The first with the offsets set to zero.
        zeroed_most_px: The second with the offsets set to zero.
    """

    pixels: int
    half_px: float
    most_px: float
    zeroed_half_px: float
    zeroed_most_px: float


@dataclass(frozen=True)
class OffsetMeasures:
    """What the offsets of a network do over a data set.

    Attributes:
        num_images: Number of images.
        labels: Which labels tell the objects: "masks" or "predictions".
        seed: Of the shuffled offsets and the random pixels.
        layers: In forward order.
        cascade: The last layers together, or None with a single layer.
        fields: The effective receptive field of each class; empty if it was not measured.
    """

    num_images: int
    labels: str
    seed: int
    layers: tuple[LayerMeasures, ...]
    cascade: CascadeMeasures | None
    fields: Mapping[str, FieldRadius] = field(default_factory=dict)

    @property
    def dead_layers(self) -> list[str]:
        """Names of the layers whose offsets never moved."""
        return [layer.name for layer in self.layers if layer.is_dead]

    @property
    def runaway_layers(self) -> list[str]:
        """Names of the layers that sample mostly outside the image."""
        return [layer.name for layer in self.layers if layer.is_runaway]

    @property
    def rank_correlation(self) -> dict[str, float]:
        """The rank correlation of the effective dilation with the area of the object, by layer."""
        return {layer.name: layer.rank_correlation for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """The content of measures.json; NaN is None."""
        content = asdict(self)
        content["images"] = content.pop("num_images")
        content["thresholds"] = {
            "dead_rms_map_px": DEAD_PX,
            "runaway_share": RUNAWAY_SHARE,
            "low_modulation": LOW_MASK,
            "high_modulation": HIGH_MASK,
        }
        for entry, layer in zip(content["layers"], self.layers, strict=True):
            entry["shares"] = layer.shares._asdict()
        content["dead_layers"] = self.dead_layers
        content["runaway_layers"] = self.runaway_layers
        return dict(_without_nan(content))


def _without_nan(value: Any) -> Any:
    """Round floats to six decimals, and replace NaN by None."""
    if isinstance(value, Mapping):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
