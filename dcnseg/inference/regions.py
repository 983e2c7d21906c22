"""The regions of a predicted label map, scored by the region head.

Entry points: `RegionMaps`, `score_regions` and `remove_regions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.models.region_head import RegionOutput, decode_boxes
from dcnseg.scoring.objects import Objects

MAX_KEPT_MAPS: Final = 8  # of the windows of an image; the others are computed again
BATCH: Final = 256  # regions pooled at a time
ROWS: Final = 256  # processed at a time, to keep temporary arrays small

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
        score: Probability of the class by the region head, times `confidence`, 0 to 1.
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
        windows: The windows of the image.
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
    head: Callable[[Tensor, Sequence[Tensor]], RegionOutput],
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
    boxes = torch.from_numpy(objects.boxes_xyxy).double()
    order, refined, probabilities = [], [], []
    for window, rows in _assign_windows(boxes, maps.windows):
        fused = maps[window]
        height, width = input_size(window)
        corner = torch.tensor([window.left, window.top] * 2)
        size = torch.tensor([window.right - window.left, window.bottom - window.top] * 2)
        scale = torch.tensor([width, height] * 2).double() / size
        for batch in rows.split(BATCH):
            local = boxes[batch] - corner
            inside = (local.clamp(min=0).minimum(size) * scale).float()
            output = head(fused, [inside.to(fused.device)])
            order.append(batch)
            probabilities.append(output.logits.double().softmax(dim=1).cpu())
            # Refined in full, not clipped to the window.
            whole = decode_boxes(local * scale, output.deltas.double().cpu())
            refined.append(whole / scale + corner)
    places = torch.cat(order).argsort()
    limit = torch.tensor(objects.numbers.shape[::-1] * 2)
    clipped = torch.cat(refined)[places].clamp(min=0).minimum(limit)
    return _make_regions(
        objects, _sum_by_object(objects, confidence), clipped, torch.cat(probabilities)[places]
    )


def _make_regions(
    objects: Objects,
    sums: npt.NDArray[np.float64],
    refined_boxes: Tensor,
    probabilities: Tensor,
) -> tuple[Region, ...]:
    """Build the regions from the sums of the confidence, [R], and the head's [R, 4], [R, K + 1]."""
    no_object = probabilities.shape[1] - 1
    voted_scores, votes = (values.tolist() for values in probabilities.max(dim=1))
    boxes, refined = objects.boxes_xyxy.tolist(), refined_boxes.tolist()
    regions = []
    for row, class_index in enumerate(objects.class_indices.tolist()):
        left, top, right, bottom = boxes[row]
        refined_left, refined_top, refined_right, refined_bottom = refined[row]
        area = int(objects.areas[row])
        confidence = float(sums[row]) / area
        regions.append(
            Region(
                class_index=class_index,
                area=area,
                box_xyxy=(left, top, right, bottom),
                refined_box_xyxy=(refined_left, refined_top, refined_right, refined_bottom),
                confidence=confidence,
                # Either alone is fooled more often: the head by small regions, the pixels by what
                # looks like an object.
                score=float(probabilities[row, class_index]) * confidence,
                voted_index=None if votes[row] == no_object else votes[row],
                voted_score=voted_scores[row],
            )
        )
    return tuple(regions)


def _sum_by_object(
    objects: Objects, values: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.float64]:
    """Sum the values [H, W] over the pixels of each object, [N]."""
    sums = np.zeros(len(objects) + 1)
    for top in range(0, len(values), ROWS):  # bincount converts what it gets to 64 bits
        rows = slice(top, top + ROWS)
        numbers, weights = objects.numbers[rows].ravel(), values[rows].ravel()
        sums += np.bincount(numbers, weights, minlength=len(sums))
    return sums[1:]


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


def to_objects(regions: Sequence[Region], numbers: npt.NDArray[np.int32]) -> Objects:
    """Return regions as objects, given the number of the region at every pixel."""
    return Objects(
        numbers,
        np.array([region.class_index for region in regions], np.int64),
        np.array([region.area for region in regions], np.int64),
        np.array([region.box_xyxy for region in regions], np.int64).reshape(-1, 4),
    )


def remove_regions(labels: UInt8Array, objects: Objects, is_removed: npt.NDArray[np.bool_]) -> None:
    """Give regions the most frequent class of the pixels around them, in place; small ones first.

    A removed region counts as a neighbor only after it got another class, so that no class spreads
    from a region that is removed. A region that fills the image or lies among ignored pixels keeps
    its class; so does the largest of several removed regions that only have each other.

    Args:
        labels: Training indices, uint8 [H, W].
        objects: The regions of `labels`.
        is_removed: Whether each region is removed, [N].
    """
    is_waiting = np.concatenate([[False], is_removed])  # by number
    rows = np.flatnonzero(is_removed)
    waiting = (1 + rows[np.argsort(objects.areas[rows], kind="stable")]).tolist()
    while waiting:
        rest = [number for number in waiting if not _fill(labels, objects, number, is_waiting)]
        if len(rest) == len(waiting):
            break
        waiting = rest
    for number in reversed(waiting):
        _fill(labels, objects, number, is_waiting)
        is_waiting[number] = False


def _fill(
    labels: UInt8Array, objects: Objects, number: int, is_waiting: npt.NDArray[np.bool_]
) -> bool:
    """Give an object the most frequent class around it; returns whether there is any."""
    left, top, right, bottom = objects.boxes_xyxy[number - 1]
    part = (slice(max(0, top - 1), bottom + 1), slice(max(0, left - 1), right + 1))
    numbers = objects.numbers[part]
    is_object = (numbers == number).view(np.uint8)
    is_neighbor = cv2.dilate(is_object, np.ones((3, 3), np.uint8)) > is_object
    around = labels[part][is_neighbor & ~is_waiting[numbers]]
    counts = np.bincount(around, minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    if not counts.any():
        return False
    labels[part][is_object.view(bool)] = counts.argmax()
    is_waiting[number] = False
    return True
