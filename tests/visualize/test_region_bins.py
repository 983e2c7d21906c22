from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from dcnseg.config import ModelConfig, Preprocessing
from dcnseg.data.synthetic import SCENE_CLASSES, generate_scene
from dcnseg.errors import ConfigError
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.regions import Region
from dcnseg.models.region_head import (
    OFFSET_GAMMA,
    FullyConnected,
    PositionSensitiveVotes,
    end_inclusive,
)
from dcnseg.models.segmenter import build_segmenter
from dcnseg.ops.roi.deformable_modules import DeformPSRoIPool
from dcnseg.ops.roi.deformable_pooling import deform_roi_pool
from dcnseg.visualize import offsets
from dcnseg.visualize.region_bins import choose_regions, compute_region_bins, has_region_offsets

OFFSET_XY = (0.5, -0.25)  # in sides of the box, before OFFSET_GAMMA

# A box, and its bins by hand. In pixels of the map of stride 8, x is 2 to 6 and y is 1 to 4, both
# inclusive: 5 columns and 4 rows. The center of pixel i is the center of image pixel 8 * i.
BOX = (16, 8, 56, 40)
COLUMNS = [(12.5, 28.5), (20.5, 44.5), (36.5, 52.5)]
ROWS = [(4.5, 20.5), (12.5, 28.5), (20.5, 36.5)]
PLAIN = np.array([[[x, y, x_end, y_end] for x, x_end in COLUMNS] for y, y_end in ROWS])
MOVE_XY = np.array([0.1 * 0.5 * 5 * 8, 0.1 * -0.25 * 4 * 8])


def make_predictor(region_head: str, input_scale: float = 1.0) -> Predictor:
    torch.manual_seed(0)
    config = ModelConfig(
        encoder="resnet18", encoder_depth=3, architecture="plain", region_head=region_head
    )
    network = build_segmenter(config, num_classes=SCENE_CLASSES.num_classes)
    preprocessing = Preprocessing(input_scale=input_scale)
    return Predictor(network, SCENE_CLASSES, preprocessing, device=torch.device("cpu"))


def make_region(
    box: tuple[int, int, int, int] = BOX, class_index: int = 2, area: int = 900, score: float = 0.9
) -> Region:
    left, top, right, bottom = box
    refined = float(left), float(top), float(right), float(bottom)
    return Region(class_index, area, box, refined, 0.8, score, class_index, score)


def make_image(height: int = 64, width: int = 96) -> npt.NDArray[np.uint8]:
    return generate_scene(0, (height, width))[0]


def position_sensitive_branch(predictor: Predictor) -> nn.Conv2d:
    votes = predictor.region_head().votes
    assert isinstance(votes, PositionSensitiveVotes)
    assert isinstance(votes.pool, DeformPSRoIPool)
    return votes.pool.offset_branch


def set_offset(predictor: Predictor, class_index: int) -> None:
    """Let all bins of a class move by OFFSET_XY, and those of the others by something else."""
    votes = predictor.region_head().votes
    with torch.no_grad():
        if isinstance(votes, FullyConnected):
            last = votes.pool.offset_branch[-1]
            assert isinstance(last, nn.Linear)
            last.bias.view(2, -1).copy_(torch.tensor(OFFSET_XY)[:, None])
            return
        bias = position_sensitive_branch(predictor).bias
        assert bias is not None
        by_class = bias.fill_(9.0).view(-1, 2, 9)  # [K + 1, (x, y), k * k]
        by_class[class_index] = torch.tensor(OFFSET_XY)[:, None]


@pytest.mark.parametrize("region_head", ["deformable-rfcn", "deformable-fc"])
def test_bins_move_by_the_offset_of_their_class(region_head: str) -> None:
    predictor = make_predictor(region_head)
    set_offset(predictor, 2)
    (bins,) = compute_region_bins(predictor, make_image(), [make_region()])
    assert bins.class_index == 2
    np.testing.assert_array_equal(bins.plain, PLAIN)
    np.testing.assert_allclose(bins.moved - bins.plain, np.tile(MOVE_XY, (3, 3, 2)), atol=1e-5)
    np.testing.assert_allclose(bins.lengths_px, np.full((3, 3), np.hypot(*MOVE_XY)), atol=1e-5)


def test_each_region_has_the_offsets_of_its_class() -> None:
    predictor = make_predictor("deformable-rfcn")
    set_offset(predictor, 3)
    regions = [make_region(class_index=class_index) for class_index in (1, 3)]
    other, own = compute_region_bins(predictor, make_image(), regions)
    assert [other.region, own.region] == regions
    np.testing.assert_allclose(own.moved - own.plain, np.tile(MOVE_XY, (3, 3, 2)), atol=1e-5)
    expected = np.tile([0.1 * 9 * 5 * 8, 0.1 * 9 * 4 * 8], (3, 3, 2))
    np.testing.assert_allclose(other.moved - other.plain, expected, atol=1e-4)


@pytest.mark.parametrize("is_limited", [False, True])
def test_bins_are_in_pixels_of_the_image_before_resizing(
    monkeypatch: pytest.MonkeyPatch, is_limited: bool
) -> None:
    if is_limited:
        monkeypatch.setattr(offsets, "MAX_NETWORK_PIXELS", 64 * 96)
    predictor = make_predictor("deformable-rfcn", 1.0 if is_limited else 0.5)
    set_offset(predictor, 2)
    left, top, right, bottom = BOX
    region = make_region((2 * left, 2 * top, 2 * right, 2 * bottom))
    (bins,) = compute_region_bins(predictor, make_image(128, 192), [region])
    np.testing.assert_array_equal(bins.plain, 2 * PLAIN)
    np.testing.assert_allclose(bins.moved - bins.plain, np.tile(2 * MOVE_XY, (3, 3, 2)), atol=1e-5)


def test_bins_are_where_the_operator_samples() -> None:
    """The mean of the coordinates over a bin is its center, also of moved bins."""
    predictor = make_predictor("deformable-rfcn")
    branch = position_sensitive_branch(predictor)
    nn.init.normal_(branch.weight, std=0.02)
    assert branch.bias is not None
    nn.init.normal_(branch.bias, std=0.3)
    image = make_image(128, 160)
    regions = [make_region((48, 40, 99, 83), 1), make_region((50, 30, 81, 96), 3)]
    computed = compute_region_bins(predictor, image, regions)

    with torch.no_grad():
        fused = predictor.model.coarse_logits_and_region_map(predictor.prepare(image))[1]
        given = torch.tensor([region.box_xyxy for region in regions]).float()
        boxes = end_inclusive([given])
        votes = predictor.region_head().votes
        assert isinstance(votes, PositionSensitiveVotes)
        assert isinstance(votes.pool, DeformPSRoIPool)
        by_class = votes.pool.predict_offset(fused, boxes)
    offset = torch.stack([by_class[i, 2 * c : 2 * c + 2] for i, c in enumerate((1, 3))])
    assert offset.std() > 0.1
    rows, columns = torch.meshgrid(*map(torch.arange, fused.shape[2:]), indexing="ij")
    coordinates = 8.0 * torch.stack([columns, rows])[None] + 0.5

    def find_centers(shift: Tensor | None) -> npt.NDArray[np.float64]:
        pooled = deform_roi_pool(coordinates, boxes, shift, 3, 1 / 8, OFFSET_GAMMA)
        return pooled.movedim(1, -1).double().numpy()

    for attribute, shift in (("plain", None), ("moved", offset)):
        drawn = np.stack([getattr(bins, attribute) for bins in computed])
        centers = (drawn[..., :2] + drawn[..., 2:]) / 2
        np.testing.assert_allclose(centers, find_centers(shift), atol=1e-3)


def test_the_bins_of_a_box_of_one_pixel_are_equal() -> None:
    predictor = make_predictor("deformable-rfcn")
    (bins,) = compute_region_bins(predictor, make_image(), [make_region((88, 56, 96, 64))])
    assert bins.plain.reshape(-1, 4).tolist() == [[84.5, 52.5, 92.5, 60.5]] * 9
    np.testing.assert_array_equal(bins.moved, bins.plain)  # an untrained head has no offsets


def test_networks_without_offsets() -> None:
    for region_head, text in (("none", "no region head"), ("rfcn", "rfcn.* has no offsets")):
        predictor = make_predictor(region_head)
        assert not has_region_offsets(predictor.model.region_head)
        with pytest.raises(ConfigError, match=text):
            compute_region_bins(predictor, make_image(), [make_region()])
    predictor = make_predictor("deformable-fc")
    assert has_region_offsets(predictor.model.region_head)
    assert compute_region_bins(predictor, make_image(), []) == []


def test_the_classes_take_turns() -> None:
    areas = [100, 1000, 10_000, 100_000]
    regions = [make_region(class_index=1, area=a, score=0.9 - 0.1 * i) for i, a in enumerate(areas)]
    regions.append(make_region(class_index=3, score=0.1))
    regions.append(make_region(class_index=2, score=0.2))
    assert choose_regions(regions, (1, 2, 3), 4) == [*regions[:2], regions[5], regions[4]]
    assert choose_regions(regions, (1, 2, 3)) == [*regions[:4], regions[5], regions[4]]
    assert choose_regions(regions, (3,)) == [regions[4]]
    assert choose_regions(regions, (0,)) == choose_regions([], (1,)) == []


def test_regions_of_other_sizes_come_first_unless_they_score_low() -> None:
    best = make_region(area=1000, score=0.9)
    similar = replace(best, area=1500, score=0.8)
    small = replace(best, area=100, score=0.5)
    noise = replace(best, area=20, score=0.1)
    regions = [similar, noise, best, small]
    assert choose_regions(regions, (2,), 3) == [best, small, similar]
    assert choose_regions(regions, (2,)) == [best, small, similar, noise]
