"""The result of predicting one image: `Prediction`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dcnseg.config import OVERLAY_OPACITY
from dcnseg.data.class_map import IGNORE_INDEX, ClassMap
from dcnseg.errors import ConfigError
from dcnseg.inference.overlay import draw_overlay
from dcnseg.inference.region_overlay import Mark, draw_marks, lay_out_regions
from dcnseg.inference.regions import Region, remove_regions, to_objects

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """The predicted classes of one image.

    Attributes:
        labels: Training index of the most probable class of each pixel, uint8 [H, W]; 255 where it
            is less probable than `PredictConfig.min_confidence`. Use `label_map` for class ids.
        class_map: Names, ids and colors of the classes.
        confidence: Probability of the most probable class, float16 [H, W]; None unless requested,
            or needed for regions.
        probabilities: Probability of each class, float16 [K, H, W]; None unless requested.
        image: The image itself, RGB, uint8 [H, W, 3].
        regions: The connected components (8 neighbors) of all classes but the background, without
            small ones and those below `PredictConfig.min_region_score`; None unless requested.
        region_numbers: 1 + the index in `regions` at every pixel, 0 for none, int32 [H, W].
    """

    labels: UInt8Array
    class_map: ClassMap
    confidence: npt.NDArray[np.float16] | None = None
    probabilities: npt.NDArray[np.float16] | None = None
    image: UInt8Array | None = None
    regions: tuple[Region, ...] | None = None
    region_numbers: npt.NDArray[np.int32] | None = None

    @cached_property
    def label_map(self) -> npt.NDArray[Any]:
        """Class ids as in the masks, [H, W], uint8 or, where an id is above 255, uint16.

        Pixels below the minimum confidence have the id 255, or the first ignored id if 255 is a
        class.
        """
        num_classes = self.class_map.num_classes
        ignored = [IGNORE_INDEX] if self.class_map.ignored_ids else []
        indices = np.array([*range(num_classes), *ignored])
        ids = self.class_map.decode_indices(indices)
        table = np.zeros(256, ids.dtype)
        table[indices] = ids
        return table[self.labels]  # not decode_indices, which takes nine times the memory

    def region_mask(self, index: int) -> npt.NDArray[np.bool_]:
        """Return the pixels of a region, bool [H, W].

        Args:
            index: In `regions`.

        Raises:
            ConfigError: The prediction was made without regions.
            IndexError: There is no such region.
        """
        regions, numbers = self.require_regions()
        mask: npt.NDArray[np.bool_] = numbers == 1 + range(len(regions))[index]
        return mask

    def region_name(self, index: int) -> str:
        """Return the name of a region's class; argument and errors as for `region_mask`."""
        regions, _ = self.require_regions()
        return self.class_map.names[regions[index].class_index]

    def require_regions(self) -> tuple[tuple[Region, ...], npt.NDArray[np.int32]]:
        """Return `regions` and `region_numbers`; raises a ConfigError if there are none."""
        if self.regions is None or self.region_numbers is None:
            raise ConfigError("This prediction has no regions; call predict with regions=True.")
        return self.regions, self.region_numbers

    @property
    def class_names(self) -> dict[int, str]:
        """The name of every class by its id."""
        return {entry.id: entry.name for entry in self.class_map.classes}

    @property
    def colors(self) -> dict[int, tuple[int, int, int]]:
        """The color (red, green, blue) of every class by its id."""
        return {entry.id: entry.color for entry in self.class_map.classes}

    @property
    def color_mask(self) -> UInt8Array:
        """The label map in the classes' colors, RGB, uint8 [H, W, 3]; ignored pixels are black."""
        return _color_table(self.class_map)[self.labels]

    def without_low_regions(self, min_score: float) -> Prediction:
        """Remove the regions with a lower score: they get the most frequent class around them."""
        if not min_score:
            return self
        regions, numbers = self.require_regions()
        is_low = np.array([region.score < min_score for region in regions], bool)
        labels, objects = self.labels.copy(), to_objects(regions, numbers)
        remove_regions(labels, objects, is_low)
        return replace(
            self,
            labels=labels,
            regions=tuple(region for region in regions if region.score >= min_score),
            region_numbers=objects.without(is_low).numbers,
        )

    def overlay(self, *, opacity: float = OVERLAY_OPACITY) -> UInt8Array:
        """Draw the classes' colors and outlines over the image, RGB, uint8 [H, W, 3].

        Regions, if there are any, have boxes with their names and scores.

        Args:
            opacity: Of the colors, from 0 (outlines only) to 1.

        Raises:
            ConfigError: The prediction was made without its image.
        """
        if self.image is None:
            raise ConfigError("This prediction has no image; pass `image` to Prediction.")
        drawn = draw_overlay(self.image, self.labels, self.class_map, opacity=opacity)
        draw_marks(drawn, self.region_marks())
        return drawn

    def region_marks(self) -> list[Mark]:
        """The boxes and labels of the regions for `draw_marks`; empty without regions."""
        if self.regions is None or self.region_numbers is None:
            return []
        return lay_out_regions(self.regions, self.region_numbers, self.class_map)


def _color_table(class_map: ClassMap) -> UInt8Array:
    """The color of every training index, uint8 [256, 3]; black where there is no class."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: class_map.num_classes] = class_map.index_colors()
    return colors
