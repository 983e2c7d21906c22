"""The regions of a predicted label map, scored by the region head.

Entry points: `RegionMaps`, `score_regions` and `remove_regions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.models.region_head import RegionHead, decode_boxes
from dcnseg.scoring.objects import Objects

MAX_KEPT_MAPS: Final = 8  # of the windows of an image; the others are computed again
BATCH: Final = 256  # regions pooled at a time

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Region:
    """A region of a prediction: a connected component of a class.

    Attributes:
        class_index: Training index of its class.
        area: In pixels.
        box_xyxy: Its left, top, right and bottom in pixels, the last two exclusive.
        refined_box_xyxy: The box as the region head refines it, clipped to the image.
        confidence: Mean probability of the class over its pixels, 0 to 1.
        score: Probability of the class by the region head, 0 to 1.
        voted_index: Training index of the region head's most probable class; None for "no object".
        voted_score: The probability of that, 0 to 1.
    """

    class_index: int
    area: int
    box_xyxy: tuple[int, int, int, int]
    refined_box_xyxy: tuple[float, float, float, float]
    confidence: float
    score: float
    voted_index: int | None
    voted_score: float


class Window(NamedTuple):
    """The pixels of an image that pass through the network together."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass
class RegionMaps:
    """The maps that regions are pooled from, by window.

    Attributes:
        compute: Computes the map of a window, [1, C, h, w].
    """

    compute: Callable[[Window], Tensor]
    windows: list[Window] = field(default_factory=list)
    _kept: dict[Window, Tensor] = field(default_factory=dict)

    def add(self, window: Window, fused: Tensor | None) -> None:
        """Add a window, and its map if it is known."""
        self.windows.append(window)
        if fused is not None and len(self._kept) < MAX_KEPT_MAPS:
            self._kept[window] = fused

    def __getitem__(self, window: Window) -> Tensor:
        fused = self._kept.get(window)
        return self.compute(window) if fused is None else fused


def score_regions(
    objects: Objects,
    confidence: npt.NDArray[np.float16],
    head: RegionHead,
    maps: RegionMaps,
    input_size: Callable[[Window], tuple[int, int]],
) -> tuple[Region, ...]:
    """Score the objects of a predicted label map; a region is pooled from the window it fits best.

    Args:
        objects: From `find_objects`.
        confidence: Probability of the predicted class of each pixel, [H, W].
        head: The region head.
        maps: The windows of the image, and their maps.
        input_size: The height and width of the network input of a window.
    """
    if not len(objects):
        return ()
    flat = objects.numbers.ravel()
    sums = np.bincount(flat, weights=confidence.ravel(), minlength=len(objects) + 1)[1:]
    boxes = torch.from_numpy(objects.boxes_xyxy).double()
    probabilities = torch.zeros(len(objects), head.num_classes + 1, dtype=torch.float64)
    refined = boxes.clone()
    for window, rows in _assign_windows(boxes, maps.windows):
        fused = maps[window]
        height, width = input_size(window)
        corner = torch.tensor([window.left, window.top] * 2)
        size = torch.tensor([window.right - window.left, window.bottom - window.top] * 2)
        scale = torch.tensor([width, height] * 2) / size
        for batch in rows.split(BATCH):
            inside = ((boxes[batch] - corner).clamp(min=0).minimum(size) * scale).float()
            output = head(fused, [inside.to(fused.device)])
            probabilities[batch] = output.logits.double().softmax(dim=1).cpu()
            # Refined in full, not clipped to the window.
            whole = (boxes[batch] - corner) * scale
            refined[batch] = decode_boxes(whole, output.deltas.double().cpu()) / scale + corner
    limit = torch.tensor(objects.numbers.shape[::-1] * 2)
    refined = refined.clamp(min=0).minimum(limit)
    own = probabilities.gather(1, torch.from_numpy(objects.class_indices)[:, None])[:, 0]
    voted_score, voted = probabilities.max(dim=1)
    columns = (objects.class_indices, objects.areas, objects.boxes_xyxy, refined, sums, own, voted)
    lists = (column.tolist() for column in (*columns, voted_score))
    return tuple(
        Region(
            class_index,
            area,
            tuple(box),
            tuple(refined_box),
            total / area,
            score,
            None if vote == head.num_classes else vote,
            vote_score,
        )
        for class_index, area, box, refined_box, total, score, vote, vote_score in zip(
            *lists, strict=True
        )
    )


def _assign_windows(boxes: Tensor, windows: Sequence[Window]) -> list[tuple[Window, Tensor]]:
    """The windows with regions, and the rows of their boxes: each in the one it fits best.

    That is the window with the largest part of the box, then the one with the nearest center.
    """
    edges = torch.tensor(windows, dtype=torch.float64)
    start = torch.maximum(boxes[:, None, :2], edges[:, :2])
    end = torch.minimum(boxes[:, None, 2:], edges[:, 2:])
    shared = (end - start).clamp(min=0).prod(dim=2)  # [R, windows]
    offset = (boxes[:, None, :2] + boxes[:, None, 2:] - edges[:, :2] - edges[:, 2:]) / 2
    distance = offset.square().sum(dim=2).sqrt()
    is_best = shared == shared.max(dim=1, keepdim=True).values
    chosen = distance.masked_fill(~is_best, torch.inf).argmin(dim=1)
    return [(windows[i], (chosen == i).nonzero()[:, 0]) for i in chosen.unique().tolist()]


def remove_regions(
    labels: UInt8Array,
    numbers: npt.NDArray[np.int32],
    regions: Sequence[Region],
    is_removed: npt.NDArray[np.bool_],
) -> None:
    """Give regions the most frequent class of the pixels around them, in place; small ones first.

    A region without neighbors, which fills the image or lies among ignored pixels, is kept.

    Args:
        labels: Training indices, uint8 [H, W].
        numbers: The number of the region at every pixel, 0 for none, [H, W].
        regions: The N regions of `labels`; the number of a region is its index + 1.
        is_removed: Whether each region is removed, [N].
    """
    height, width = labels.shape
    removed = np.flatnonzero(is_removed).tolist()
    for index in sorted(removed, key=lambda index: regions[index].area):
        left, top, right, bottom = regions[index].box_xyxy
        area = (
            slice(max(0, top - 1), min(height, bottom + 1)),
            slice(max(0, left - 1), min(width, right + 1)),
        )
        is_region = (numbers[area] == index + 1).view(np.uint8)
        around = cv2.dilate(is_region, np.ones((3, 3), np.uint8)) > is_region
        counts = np.bincount(labels[area][around], minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
        if counts.any():
            labels[area][is_region.view(bool)] = counts.argmax()
