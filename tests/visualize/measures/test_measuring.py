from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from dcnseg.config import ModelConfig, Preprocessing
from dcnseg.data.pairing.folders import find_splits
from dcnseg.data.sample import Sample
from dcnseg.data.synthetic import SCENE_CLASSES
from dcnseg.errors import ConfigError
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import build_segmenter
from dcnseg.visualize.measures.measuring import OffsetSums, measure_offsets
from dcnseg.visualize.measures.results import Groups, LayerMeasures, OffsetMeasures
from dcnseg.visualize.offsets import LayerOffsets, trace_cascade
from tests.layer_offsets import (
    CLASSES,
    STEPS,
    STRIDE,
    make_labels,
    make_layer,
    make_radial_offset,
    make_zero_offset,
)

LABELS, NUMBERS = make_labels()
HW = (16, 20)  # of the map
SIZES = {1: "small", 2: "medium", 3: "small", 4: "background"}
AT = slice(0, None, STRIDE)

Numbers = npt.NDArray[np.int64]


def measure(*images: tuple[Sequence[LayerOffsets], npt.NDArray[np.uint8]]) -> OffsetMeasures:
    sums = OffsetSums(CLASSES, seed=5)
    for layers, labels in images:
        sums.add(layers, labels)
    return sums.result()


def measure_layer(layer: LayerOffsets) -> LayerMeasures:
    (found,) = measure(([layer], LABELS)).layers
    return found


def draw_offset(seed: int, size_hw: tuple[int, int] = HW, groups: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(groups, 9, 2, *size_hw, generator=generator)


def lookup(numbers: Numbers, y: float, x: float) -> int | None:
    """The number of the pixel at a point, None outside."""
    row, column = int(np.floor(y + 0.5)), int(np.floor(x + 0.5))
    is_inside = 0 <= row < numbers.shape[0] and 0 <= column < numbers.shape[1]
    return int(numbers[row, column]) if is_inside else None


def count_by_loop(
    images: Sequence[tuple[Tensor, Numbers]], mask: Tensor | None = None
) -> dict[str, float]:
    """The shares of points on the object of their center, by size and for all objects."""
    hits: dict[str, float] = {}
    points: dict[str, float] = {}
    for offset, numbers in images:
        groups, _, _, height, width = offset.shape
        for row, column in np.ndindex(height, width):
            center = lookup(numbers, row * STRIDE, column * STRIDE)
            if center is None or center < 1:
                continue
            for group, tap in np.ndindex(groups, 9):
                dy, dx = (float(v) for v in offset[group, tap, :, row, column])
                y = STRIDE * (row + tap // 3 - 1 + dy)
                x = STRIDE * (column + tap % 3 - 1 + dx)
                found = lookup(numbers, y, x)
                if found == -1:
                    continue
                weight = 1.0 if mask is None else float(mask[group, tap, row, column])
                for name in (SIZES[center], *(["objects"] if center < 4 else [])):
                    hits[name] = hits.get(name, 0) + weight * (found == center)
                    points[name] = points.get(name, 0) + weight
    return {name: hits[name] / points[name] for name in points}


def shares_of(groups: Groups, kind: str) -> dict[str, float]:
    found = {"objects": groups["all"]["objects"], **groups["size"]}
    return {name: getattr(group.on_object, kind) for name, group in found.items()}


def assert_shares(layer: LayerMeasures, kind: str, expected: dict[str, float]) -> None:
    found = shares_of(layer.groups, kind)
    assert {name: value for name, value in found.items() if not np.isnan(value)} == pytest.approx(
        expected
    )


def test_zero_offsets_are_plain() -> None:
    layer = measure_layer(make_layer(make_zero_offset(HW)))
    assert layer.plain_dilation_px == STRIDE
    for groups in layer.groups.values():
        for group in groups.values():
            if group.locations:
                assert group.dilation.px == group.dilation.relative * STRIDE == STRIDE
                assert group.dilation.deviation_px == 0
    expected = count_by_loop([(make_zero_offset(HW), NUMBERS)])
    assert set(expected) == {"small", "medium", "background", "objects"}
    assert 0.3 < expected["small"] < expected["medium"] < 1
    for kind in ("own", "plain", "shuffled"):
        assert_shares(layer, kind, expected)
    assert layer.outside_share == layer.plain_outside_share > 0
    assert layer.is_dead
    assert not layer.is_runaway
    assert np.isnan(layer.shares).all()
    assert layer.groups["size"]["large"].locations == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_on_object_matches_a_loop(groups: int) -> None:
    offset = draw_offset(0, groups=groups)
    mask = 2 * torch.rand(groups, 9, *HW)
    layer = measure_layer(make_layer(offset, mask))
    assert_shares(layer, "own", count_by_loop([(offset, NUMBERS)]))
    assert_shares(layer, "plain", count_by_loop([(make_zero_offset(HW, groups), NUMBERS)]))
    assert_shares(layer, "modulated", count_by_loop([(offset, NUMBERS)], mask))
    outside = [
        lookup(NUMBERS, *(STRIDE * (place + step + offset[g, t, :, place[0], place[1]])).tolist())
        is None
        for g, t, *index in np.ndindex(groups, 9, *HW)
        for place, step in [(torch.tensor(index), STEPS.reshape(9, 2)[t])]
    ]
    assert layer.outside_share == pytest.approx(np.mean(outside))


def test_dilation_follows_the_object() -> None:
    scale = torch.ones(HW)
    on_object = NUMBERS[AT, AT]
    for number, factor in ((1, 1.5), (2, 3.0), (3, 2.0)):
        scale[torch.from_numpy(on_object == number)] = factor
    layer = measure_layer(make_layer(make_radial_offset(scale)))
    sizes, classes = layer.groups["size"], layer.groups["class"]
    assert sizes["medium"].dilation.px == pytest.approx(3 * STRIDE)
    assert sizes["medium"].dilation.relative == pytest.approx(3)
    assert sizes["background"].dilation.px == pytest.approx(STRIDE)
    numbers = (on_object == 1).sum(), (on_object == 3).sum()
    assert sizes["small"].locations == sum(numbers)
    values = np.repeat([1.5, 2.0], numbers)
    assert sizes["small"].dilation.relative == pytest.approx(values.mean())
    assert sizes["small"].dilation.deviation_px == pytest.approx(STRIDE * values.std())
    ring = LABELS[AT, AT] == 2  # with the object that is too small
    assert classes["<b>ring</b>"].locations == ring.sum()
    assert classes["<b>ring</b>"].dilation.relative == pytest.approx(scale.numpy()[ring].mean())
    near = layer.groups["distance"]["0-4"].locations
    assert near + layer.groups["distance"]["4-8"].locations < (on_object > 0).sum()
    assert (
        sum(g.locations for g in layer.groups["distance"].values())
        == ((on_object > 0) & (on_object < 4)).sum()
    )
    assert layer.groups["all"]["all"].locations == (LABELS[AT, AT] != 255).sum()
    assert layer.rank_correlation == pytest.approx(1)


def test_offsets_that_adapt_beat_shuffled_ones() -> None:
    # All points of objects are at their center; those of the background are far away.
    on_object = torch.from_numpy((NUMBERS[AT, AT] > 0) & (NUMBERS[AT, AT] < 4))
    layer = measure_layer(make_layer(make_radial_offset(torch.where(on_object, 0.0, 4.0))))
    shares = layer.groups["all"]["objects"].on_object
    assert shares.own == 1
    assert shares.shuffled < shares.own - 0.1
    assert shares.plain < 1
    assert np.isnan(shares.modulated)


def test_constant_offsets_do_not_change_when_shuffled() -> None:
    layer = measure_layer(make_layer(draw_offset(3, (1, 1)).expand(-1, -1, -1, *HW)))
    for groups in layer.groups.values():
        for group in groups.values():
            assert group.on_object.own == pytest.approx(group.on_object.shuffled, nan_ok=True)
    assert layer.shares.constant == pytest.approx(1)
    assert np.array(layer.mean_offset_map_px) == pytest.approx(
        draw_offset(3, (1, 1))[..., 0, 0].numpy(), abs=1e-6
    )


def test_images_of_different_sizes_add_up() -> None:
    labels, numbers = LABELS[:49, :66], NUMBERS[:49, :66]
    offsets = draw_offset(1), draw_offset(2, (13, 17))
    # The second image cuts the second object, which stays medium, and has more map than image.
    padded = draw_offset(2, (14, 20))
    padded[..., :13, :17] = offsets[1]
    found = measure(([make_layer(offsets[0])], LABELS), ([make_layer(padded)], labels))
    (layer,) = found.layers
    assert found.num_images == 2
    expected = count_by_loop([(offsets[0], NUMBERS), (offsets[1], numbers)])
    assert_shares(layer, "own", expected)
    assert layer.groups["all"]["all"].locations == sum(
        int((image[AT, AT] != 255).sum()) for image in (LABELS, labels)
    )
    flat = torch.cat([offset.flatten(3) for offset in offsets], dim=3)
    assert layer.rms_offset_map_px == pytest.approx(float((flat**2).sum(2).mean().sqrt()))
    assert np.isnan(layer.shares.content)
    first, second = (
        measure(([make_layer(offset)], image)).layers[0]
        for offset, image in ((offsets[0], LABELS), (padded, labels))
    )
    for by, groups in layer.groups.items():
        for name, group in groups.items():
            parts = first.groups[by][name], second.groups[by][name]
            counts = [part.locations for part in parts]
            assert group.locations == sum(counts)
            if all(counts):
                means = [part.dilation.px for part in parts]
                assert group.dilation.px == pytest.approx(np.average(means, weights=counts))


def test_the_part_of_an_image_depends_on_the_seed_only() -> None:
    images = [([make_layer(draw_offset(seed))], LABELS) for seed in (1, 2)]
    assert measure(*images).to_dict() == measure(*images).to_dict()
    sums = OffsetSums(CLASSES, seed=6)
    sums.add(*images[0])
    other = sums.result().layers[0].groups["all"]["objects"].on_object
    same = measure(images[0]).layers[0].groups["all"]["objects"].on_object
    assert (other.own, other.plain) == (same.own, same.plain)
    assert other.shuffled != same.shuffled


def test_offsets_that_are_not_finite_are_left_out() -> None:
    offset, clean = draw_offset(4), draw_offset(4)
    offset[0, 0, 0, 7, 3] = torch.nan  # on the second object
    offset[0, 8, 1, 7, 4] = torch.inf
    layer, expected = measure_layer(make_layer(offset)), measure_layer(make_layer(clean))
    assert layer.not_finite_share == pytest.approx(2 / 320)
    assert expected.not_finite_share == 0
    kept, whole = (x.groups["size"]["medium"] for x in (layer, expected))
    assert kept.locations == whole.locations - 2
    assert np.isfinite([kept.dilation.px, kept.on_object.own, layer.outside_share]).all()
    assert layer.groups["size"]["small"].dilation == expected.groups["size"]["small"].dilation
    broken = measure_layer(make_layer(torch.full_like(offset, torch.nan)))
    assert broken.not_finite_share == 1
    assert not broken.is_dead
    json.dumps(measure(([make_layer(offset)] * 2, LABELS)).to_dict(), allow_nan=False)


def test_labels_without_objects() -> None:
    for value in (0, 255):
        labels = np.full((64, 80), value, np.uint8)
        (layer,) = measure(([make_layer(draw_offset(1))], labels)).layers
        assert layer.groups["all"]["all"].locations == (320 if value == 0 else 0)
        assert np.isnan(layer.groups["all"]["objects"].on_object.own)
        assert np.isnan(layer.rank_correlation)
        assert 0 < layer.outside_share < 1


def test_an_object_between_the_locations_is_not_measured() -> None:
    labels = np.zeros((64, 80), np.uint8)
    labels[1:4, 1:20] = 1
    (layer,) = measure(([make_layer(draw_offset(1))], labels)).layers
    assert layer.groups["size"]["small"].locations == 0
    assert layer.groups["class"]["disc"].locations == 0


def test_cascade_matches_single_points() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = 2 * torch.rand(1, 9, *HW, generator=generator)
    layers = [make_layer(draw_offset(1)), make_layer(draw_offset(2), mask, name="b")]
    found = measure((layers, LABELS)).cascade
    assert found is not None
    assert found.layers == ("a", "b")
    kinds: dict[str, list[float]] = {"own": [0, 0], "plain": [0, 0], "modulated": [0, 0]}
    outside: dict[bool, list[int]] = {False: [0, 0], True: [0, 0]}
    for row, column in np.ndindex(*HW):
        center = NUMBERS[row * STRIDE, column * STRIDE]
        for is_plain in (False, True):
            point = float(column * STRIDE), float(row * STRIDE)
            samples = trace_cascade(layers, point, is_plain=is_plain)
            for (x, y), weight in zip(
                samples.positions_xy.tolist(), samples.weights.tolist(), strict=True
            ):
                number = lookup(NUMBERS, y, x)
                outside[is_plain][0] += number is None
                outside[is_plain][1] += 1
                if number == -1 or not 1 <= center <= 3:
                    continue
                kinds["plain" if is_plain else "own"][0] += number == center
                kinds["plain" if is_plain else "own"][1] += 1
                if not is_plain:
                    kinds["modulated"][0] += weight * (number == center)
                    kinds["modulated"][1] += weight
    group = found.groups["all"]["objects"]
    for kind, (hits, points) in kinds.items():
        assert getattr(group.on_object, kind) == pytest.approx(hits / points, rel=1e-5)
    assert found.outside_share == pytest.approx(outside[False][0] / outside[False][1])
    assert found.plain_outside_share == pytest.approx(outside[True][0] / outside[True][1])
    assert group.locations == ((NUMBERS[AT, AT] > 0) & (NUMBERS[AT, AT] < 4)).sum()


def test_marked_pixels_of_the_cascade() -> None:
    layers = [make_layer(draw_offset(1)), make_layer(draw_offset(2), name="b")]
    marked = np.random.default_rng(0).random(LABELS.shape) < 0.4
    sums = OffsetSums(CLASSES)
    sums.add(layers, LABELS, marked)
    on_object, on_marked = sums.cascade_shares()
    cascade = sums.result().cascade
    assert cascade is not None
    assert on_object.own == cascade.groups["all"]["objects"].on_object.own
    numbers = np.where(marked | (NUMBERS == -1), NUMBERS, 0)
    for is_plain, share in ((False, on_marked.own), (True, on_marked.plain)):
        hits = points = 0
        for row, column in np.ndindex(*HW):
            center = int(NUMBERS[row * STRIDE, column * STRIDE])
            if 1 <= center <= 3:
                point = float(column * STRIDE), float(row * STRIDE)
                samples = trace_cascade(layers, point, is_plain=is_plain)
                found = [lookup(numbers, y, x) for x, y in samples.positions_xy.tolist()]
                hits += found.count(center)
                points += len(found) - found.count(-1)
        assert share == pytest.approx(hits / points)


def test_modulation() -> None:
    mask = torch.ones(2, 9, *HW)
    mask[0, 0] = 0.05
    mask[1, 8] = 1.95
    mask[1, 7] = 1.5
    layer = measure_layer(make_layer(draw_offset(1, groups=2), mask))
    assert layer.modulation is not None
    expected = np.ones((2, 9))
    expected[0, 0], expected[1, 8], expected[1, 7] = 0.05, 1.95, 1.5
    assert np.array(layer.modulation.tap_means) == pytest.approx(expected)
    assert layer.modulation.mean == pytest.approx(expected.mean())
    assert layer.modulation.low_share == layer.modulation.high_share == pytest.approx(1 / 18)


def test_dead_and_runaway_layers_are_named() -> None:
    layers = [
        make_layer(0.02 * torch.ones(1, 9, 2, *HW), name="dead"),
        make_layer(draw_offset(1), name="good"),
        make_layer(100 * draw_offset(1), name="runaway"),
    ]
    found = measure((layers, LABELS))
    assert found.dead_layers == ["dead"]
    assert found.runaway_layers == ["runaway"]
    content = found.to_dict()
    assert (content["dead_layers"], content["runaway_layers"]) == (["dead"], ["runaway"])
    assert content["thresholds"]["dead_rms_map_px"] == 0.05
    assert content["layers"][0]["shares"] == {"constant": 1.0, "position": None, "content": None}


def make_predictor(scale: float) -> Predictor:
    """A network whose offsets stretch the grid by `scale`, everywhere alike."""
    config = ModelConfig(encoder="resnet18", encoder_depth=3, architecture="plain", deform_layers=2)
    model = build_segmenter(config, SCENE_CLASSES.num_classes).eval()
    for layer in model.deformable_layers().values():
        assert layer.conv_offset.bias is not None
        layer.conv_offset.bias.data = (scale - 1) * STEPS.flatten()
    return Predictor(model, SCENE_CLASSES, Preprocessing(), device=torch.device("cpu"))


def test_a_network_over_files(predictor: Predictor, scenes: Path) -> None:
    images = find_splits(scenes).val
    calls: list[tuple[int, ...]] = []
    found = measure_offsets(
        predictor, images, pixels_per_class=1, on_progress=lambda *done: calls.append(done)
    )
    assert calls[:3] == [(1, 3), (2, 3), (3, 3)]
    assert [layer.name for layer in found.layers] == list(predictor.model.deformable_layers())
    assert found.labels == "masks"
    assert set(found.fields) <= set(predictor.class_map.names)
    for field in found.fields.values():
        assert field.pixels == 1
        assert 0 < field.half_px < field.most_px < 120
        assert 0 < field.zeroed_half_px < field.zeroed_most_px < 120
    assert found.layers[0].groups["all"]["all"].locations == 3 * 4 * 6


def test_a_stretched_network(scenes: Path) -> None:
    images: Sequence[Sample] = find_splits(scenes).val[:1]
    found = measure_offsets(make_predictor(1.5), images, pixels_per_class=0)
    assert found.fields == {}
    for layer in found.layers:
        assert layer.plain_dilation_px == 8
        assert layer.groups["all"]["all"].dilation.px == pytest.approx(12)
        assert layer.shares.constant == pytest.approx(1)


def test_a_plain_network_is_an_error(scenes: Path) -> None:
    config = ModelConfig(encoder="resnet18", encoder_depth=3, architecture="plain", deform_layers=0)
    model = build_segmenter(config, SCENE_CLASSES.num_classes)
    plain = Predictor(model, SCENE_CLASSES, Preprocessing(), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="no deformable layer"):
        measure_offsets(plain, find_splits(scenes).val)
