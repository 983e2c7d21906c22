"""The bins of regions in the region head, plain and moved by their offsets.

Entry points: `has_region_offsets`, `choose_regions` and `compute_region_bins`.

Source: Dai et al. 2017, "Deformable Convolutional Networks", Figure 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dcnseg.errors import ConfigError
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.regions import Region
from dcnseg.models.region_head import RegionHead, end_inclusive
from dcnseg.ops.roi.deformable_modules import DeformPSRoIPool, DeformRoIPool
from dcnseg.ops.roi.geometry import locate_regions, make_samples, make_shift
from dcnseg.visualize.geometry import MapGeometry, trace_map_geometry
from dcnseg.visualize.offsets import limit_size

MAX_REGIONS: Final = 6
SIMILAR_AREAS: Final = 2.0  # regions of a class are similar if their areas differ by less

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RegionBins:
    """The k x k bins of a region, as (left, top, right, bottom) in image pixels.

    (0, 0) is the upper left corner of the image, as in `Region.box_xyxy`. A bin is the area of the
    pixels of the feature map over which the region head averages. The bins are larger than k x k
    equal parts of the box, because they consist of whole pixels of the feature map.

    Attributes:
        region: The region.
        plain: The bins without offsets, [k, k, 4], row by row. A bin without pixels has no area.
        moved: The bins moved by the offsets of the region's class, [k, k, 4]; NaN for NaN offsets.
    """

    region: Region
    plain: Floats
    moved: Floats

    @property
    def class_index(self) -> int:
        """Training index of the region's class."""
        return self.region.class_index

    @property
    def lengths_px(self) -> Floats:
        """How far each bin moves, in image pixels, [k, k]."""
        return np.asarray(np.linalg.norm((self.moved - self.plain)[..., :2], axis=-1))


def has_region_offsets(head: RegionHead | None) -> bool:
    """Whether the bins of a region head have offsets."""
    return head is not None and _get_pool(head) is not None


def choose_regions(
    regions: Iterable[Region], classes: Sequence[int], max_regions: int = MAX_REGIONS
) -> list[Region]:
    """Choose regions to draw: the classes in turn, the regions with the highest scores first.

    The score of a region counts half for each chosen one of the same class with a similar area.

    Args:
        regions: The regions of an image.
        classes: Training indices of the classes to choose from.
        max_regions: Maximum number of regions.

    Returns:
        The regions by class, each class in the order of its choice.
    """
    remaining = [region for region in regions if region.class_index in classes]
    chosen: list[Region] = []

    def rank(region: Region) -> tuple[int, float]:
        same = [other for other in chosen if other.class_index == region.class_index]
        num_similar = sum(_are_similar(region, other) for other in same)
        return len(same), -region.score / 2**num_similar

    while remaining and len(chosen) < max_regions:
        best = min(range(len(remaining)), key=lambda i: rank(remaining[i]))
        chosen.append(remaining.pop(best))
    return sorted(chosen, key=lambda region: region.class_index)


@torch.no_grad()
def compute_region_bins(
    predictor: Predictor, image: npt.NDArray[np.uint8], regions: Sequence[Region]
) -> list[RegionBins]:
    """Compute the bins of regions, with the offsets of one pass over the whole image.

    Args:
        predictor: A predictor whose network has a region head with offsets.
        image: RGB, uint8 [H, W, 3]. It is not split into windows, but reduced by `limit_size`.
        regions: Regions of the image.

    Raises:
        ConfigError: The network has no region head, or one without offsets.
    """
    head = predictor.region_head()
    pool = _get_pool(head)
    if pool is None:
        raise ConfigError(
            f"The region head ({head.pooling}) has no offsets. Train with --region-head "
            "deformable-rfcn or deformable-fc."
        )
    if not regions:
        return []
    x = limit_size(predictor.prepare(image))
    with trace_map_geometry(predictor.model) as trace:
        fused = predictor.model.coarse_logits_and_region_map(x)[1]
    network_hw, image_hw = (x.shape[2], x.shape[3]), (image.shape[0], image.shape[1])
    geometry = trace.of((fused.shape[2], fused.shape[3])).in_image(network_hw, image_hw)
    scale = torch.tensor(network_hw[::-1] * 2) / torch.tensor(image_hw[::-1] * 2)
    boxes = torch.tensor([region.box_xyxy for region in regions], dtype=torch.float64) * scale
    classes = torch.tensor([region.class_index for region in regions])
    plain, shift = _locate_bins(pool, fused, boxes.float().to(fused.device), classes)
    stride = torch.tensor(geometry.stride_px[::-1] * 2, dtype=torch.float64)
    in_image = _to_image(plain, geometry)
    moved = in_image + shift.repeat(1, 1, 1, 2) * stride
    return [
        RegionBins(*each) for each in zip(regions, in_image.numpy(), moved.numpy(), strict=True)
    ]


def _get_pool(head: RegionHead) -> DeformRoIPool | DeformPSRoIPool | None:
    """The pooling whose offsets move the bins of the classes; None without offsets."""
    pool = head.votes.pool
    return pool if isinstance(pool, DeformRoIPool | DeformPSRoIPool) else None


def _locate_bins(
    pool: DeformRoIPool | DeformPSRoIPool, fused: Tensor, boxes: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the bins and the shifts of the regions' classes, in pixels of the map.

    Args:
        pool: The pooling of the head.
        fused: The map that regions are pooled from, [1, C, h, w].
        boxes: (left, top, right, bottom) in pixels of the network input, [R, 4].
        classes: Training indices, [R].

    Returns:
        Bins (left, top, right, bottom), [R, k, k, 4], and shifts (x, y), [R, k, k, 2], float64 on
        the CPU. The center of pixel i of the map is at i.
    """
    inclusive = end_inclusive([boxes])
    regions = locate_regions(inclusive, fused)
    size_hw = fused.shape[2], fused.shape[3]
    bins_hw = pool.output_size
    samples, size = make_samples(pool.mode, regions, bins_hw, pool.spatial_scale, size_hw, 0)
    shift = make_shift(pool.predict_offset(fused, inclusive), size, pool.gamma)
    by_class = shift.unflatten(1, (-1, 2)).double().cpu()  # [R, K + 1 + 4 or 1, 2, k, k]
    own = by_class[torch.arange(len(classes)), classes.clamp(max=by_class.shape[1] - 1)]
    kh, kw = bins_hw
    parts = samples[:, 1:].double().cpu().split([kh, kh, kh, kw, kw, kw], 1)
    (top, bottom), (left, right) = (
        (first - step / 2, first + (count - 0.5) * step)
        for first, step, count in (parts[:3], parts[3:])
    )
    edges = left[:, None], top[:, :, None], right[:, None], bottom[:, :, None]
    plain = torch.stack([edge.expand(-1, kh, kw) for edge in edges], -1)
    return plain, own.movedim(1, -1)


def _are_similar(region: Region, other: Region) -> bool:
    small, large = sorted((region.area, other.area))
    return large < SIMILAR_AREAS * small


def _to_image(boxes: Tensor, geometry: MapGeometry) -> Tensor:
    """Convert boxes from pixels of a map to image pixels, counted from the corner of the image."""
    stride = torch.tensor(geometry.stride_px[::-1] * 2, dtype=torch.float64)
    origin = torch.tensor(geometry.origin_px[::-1] * 2, dtype=torch.float64)
    return boxes * stride + origin + 0.5
