"""Training of the region head; entry point `build_region_objective`.

The ground truth are the objects of the label maps: connected components of each class. Regions to
learn from are boxes near objects, boxes of predicted objects, and boxes elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_iou

from dcnseg.config import TrainConfig
from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.models.region_head import RegionOutput, encode_boxes
from dcnseg.models.segmenter import Segmenter
from dcnseg.scoring.objects import Objects, find_objects

REGIONS_PER_IMAGE: Final = 64
OHEM_FACTOR: Final = 2  # regions sampled for each region that is kept
NEAR_SHARE: Final = 3 / 8  # of the regions; boxes near objects
PREDICTED_SHARE: Final = 3 / 8  # at most
MIN_IOU: Final = 0.5  # of a box, or of a predicted region, with the object whose class it has
MAX_SHIFT: Final = 0.25  # of a box near an object, in sides of the object
MAX_LOG_SCALE: Final = 0.35
MIN_SIDE: Final = 8.0  # pixels, of a box elsewhere
MAX_LOG_ASPECT: Final = 0.7
PREDICTED_STRIDE: Final = 4  # predicted objects are found on every fourth pixel
NO_LOSS: Final = -100


class RegionTargets(NamedTuple):
    """The regions of a batch and what they are.

    Attributes:
        boxes: The regions of each image, float32 [Ri, 4].
        classes: Class of each region, [R]: 0 to K - 1, K for "no object", -100 for "unknown".
        deltas: The refinement that gives the box of the region's object, [R, 4]; 0 without one.
    """

    boxes: list[Tensor]
    classes: Tensor
    deltas: Tensor


@dataclass(frozen=True)
class RegionObjective:
    """Samples regions and computes the loss of the region head.

    Attributes:
        classes: Training indices of the classes with objects.
        num_classes: K.
        min_area: Objects with fewer pixels are ignored.
        weight: Factor of the loss.
        has_ohem: Whether to learn only from the half of a batch's regions with the largest loss
            (online hard example mining, Dai et al. 2016, section 2.3, there per image).
    """

    classes: Collection[int]
    num_classes: int
    min_area: int
    weight: float
    has_ohem: bool

    def forward(
        self,
        model: Segmenter | DistributedDataParallel,
        images: Tensor,
        labels: Tensor,
        mean: Callable[[Tensor], Tensor] = lambda count: count,
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits of a batch, and the weighted loss of its regions.

        Args:
            model: A network with a region head.
            images: Normalized images, [B, 3, H, W].
            labels: Training indices, [B, H, W].
            mean: See `loss`.
        """
        sampled: list[RegionTargets] = []

        def propose(logits: Tensor) -> list[Tensor]:
            sampled.append(self.sample(labels, logits))
            return sampled[0].boxes

        logits, output = model(images, propose)
        return logits, self.weight * self.loss(output, sampled[0], mean)

    def sample(self, labels: Tensor, logits: Tensor) -> RegionTargets:
        """Sample the regions of a batch with torch's default random number generator.

        Args:
            labels: Training indices, [B, H, W].
            logits: The current logits, [B, K, H, W].
        """
        coarse = logits.detach()[..., ::PREDICTED_STRIDE, ::PREDICTED_STRIDE]
        predicted = coarse.argmax(dim=1).to(torch.uint8).cpu().numpy()
        maps = labels.to(torch.uint8).cpu().numpy()
        count = REGIONS_PER_IMAGE * (OHEM_FACTOR if self.has_ohem else 1)
        regions = [self._sample_image(*pair, count) for pair in zip(maps, predicted, strict=True)]
        boxes, classes, deltas = zip(*regions, strict=True)
        device = logits.device
        return RegionTargets(
            [of_image.to(device) for of_image in boxes],
            torch.cat(classes).to(device),
            torch.cat(deltas).to(device),
        )

    def loss(
        self,
        output: RegionOutput,
        targets: RegionTargets,
        mean: Callable[[Tensor], Tensor] = lambda count: count,
    ) -> Tensor:
        """Cross entropy of the classes plus smooth L1 of the boxes, averaged over the regions.

        Args:
            output: The output of the region head.
            targets: What the regions are.
            mean: Averages the number of regions over processes that share a batch.
        """
        losses = F.cross_entropy(
            output.logits, targets.classes, ignore_index=NO_LOSS, reduction="none"
        )
        is_object = (targets.classes >= 0) & (targets.classes < self.num_classes)
        distance = F.smooth_l1_loss(output.deltas, targets.deltas, reduction="none").sum(dim=1)
        losses = losses + torch.where(is_object, distance, 0.0)
        count = (targets.classes != NO_LOSS).sum()
        if self.has_ohem:
            losses = losses.topk(len(losses) // OHEM_FACTOR).values
            count = count.clamp(max=len(losses))
        return losses.sum() / mean(count).clamp(min=1)

    def _sample_image(
        self,
        labels: npt.NDArray[np.uint8],
        predicted: npt.NDArray[np.uint8],
        count: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample `count` regions of an image: boxes, classes and deltas."""
        objects = find_objects(labels, self.classes, self.min_area)
        guesses = find_objects(predicted, self.classes, self.min_area // PREDICTED_STRIDE**2)
        truth = _boxes(objects)
        near = torch.randint(len(objects), (round(NEAR_SHARE * count),)) if len(objects) else None
        chosen = torch.randperm(len(guesses))[: round(PREDICTED_SHARE * count)]
        parts = [
            _jitter(truth[near]) if near is not None else truth,
            _boxes(guesses)[chosen] * PREDICTED_STRIDE,
        ]
        parts.append(_random_boxes(count - sum(map(len, parts)), labels.shape))
        boxes = torch.cat(parts)
        iou = box_iou(boxes, truth)  # [R, N]
        first = len(parts[0])
        iou[first : first + len(chosen)] = _mask_iou(guesses, objects)[chosen]
        classes, matches = self._match(iou, objects)
        classes[(classes == self.num_classes) & _is_unknown(boxes, labels)] = NO_LOSS
        deltas = torch.zeros(count, 4)
        is_object = matches >= 0
        deltas[is_object] = encode_boxes(boxes[is_object], truth[matches[is_object]])
        return boxes, classes, deltas

    def _match(self, iou: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
        """Find the class of each region, given its IoU, [R, N], and its object's row (-1: none)."""
        classes = torch.full((len(iou),), self.num_classes)
        matches = torch.full((len(iou),), -1)
        if len(objects):
            highest, best = iou.max(dim=1)
            is_object = highest >= MIN_IOU
            matches[is_object] = best[is_object]
            classes[is_object] = torch.from_numpy(objects.class_indices)[best[is_object]]
        return classes, matches


def build_region_objective(
    config: TrainConfig, classes: Collection[int], num_classes: int
) -> RegionObjective | None:
    """The objective of a run, or None if its network has no region head; arguments as above."""
    if config.model.region_head == "none":
        return None
    return RegionObjective(
        classes,
        num_classes,
        config.model.region_min_area,
        config.region_weight,
        config.region_ohem,
    )


def _boxes(objects: Objects) -> Tensor:
    return torch.from_numpy(objects.boxes_xyxy).float()


def _mask_iou(guesses: Objects, objects: Objects) -> Tensor:
    """The IoU of predicted objects, on every fourth pixel, with those of the label map, [G, N].

    A region of the wrong shape is no object, even if its box is right.
    """
    coarse = objects.numbers[::PREDICTED_STRIDE, ::PREDICTED_STRIDE]
    shape = len(guesses) + 1, len(objects) + 1
    pairs = guesses.numbers.astype(np.int64) * shape[1] + coarse
    shared = np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)[1:, 1:]
    areas = np.bincount(coarse.ravel(), minlength=shape[1])[1:]
    return torch.from_numpy(shared / (guesses.areas[:, None] + areas - shared)).float()


def _jitter(boxes: Tensor) -> Tensor:
    """Shift and scale boxes at random; a box whose IoU falls below MIN_IOU is kept as it is."""
    sides = boxes[:, 2:] - boxes[:, :2]
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2 + _uniform(len(boxes), 2, MAX_SHIFT) * sides
    half = sides * _uniform(len(boxes), 2, MAX_LOG_SCALE).exp() / 2
    moved = torch.cat([centers - half, centers + half], dim=1)
    overlap = (torch.minimum(moved, boxes)[:, 2:] - torch.maximum(moved, boxes)[:, :2]).clamp(min=0)
    shared = overlap.prod(dim=1)
    union = sides.prod(dim=1) + (2 * half).prod(dim=1) - shared
    return torch.where((shared >= MIN_IOU * union)[:, None], moved, boxes)


def _random_boxes(count: int, size_hw: Sequence[int]) -> Tensor:
    """Boxes of any size, place and shape, clipped to the image."""
    height, width = size_hw
    longest = math.log(max(height, width, MIN_SIDE))
    log_side = math.log(MIN_SIDE) + torch.rand(count, 1) * (longest - math.log(MIN_SIDE))
    log_aspect = _uniform(count, 1, MAX_LOG_ASPECT)
    half = torch.cat([log_side + log_aspect, log_side - log_aspect], dim=1).exp() / 2
    limit = torch.tensor([width, height], dtype=torch.float32)
    half = half.minimum(limit / 2)
    centers = half + torch.rand(count, 2) * (limit - 2 * half)
    return torch.cat([centers - half, centers + half], dim=1)


def _uniform(rows: int, columns: int, limit: float) -> Tensor:
    return (2 * torch.rand(rows, columns) - 1) * limit


def _is_unknown(boxes: Tensor, labels: npt.NDArray[np.uint8]) -> Tensor:
    """Whether more than half of the pixels of a box are ignored."""
    sums = np.zeros((labels.shape[0] + 1, labels.shape[1] + 1), np.int64)
    sums[1:, 1:] = (labels == IGNORE_INDEX).cumsum(0).cumsum(1)
    height, width = labels.shape
    left, top, right, bottom = boxes.round().long().numpy().T
    left, right = left.clip(0, width), right.clip(0, width)
    top, bottom = top.clip(0, height), bottom.clip(0, height)
    ignored = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return torch.from_numpy(2 * ignored > (right - left) * (bottom - top))
