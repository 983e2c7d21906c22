from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from dcnseg.config import PredictConfig, Preprocessing
from dcnseg.errors import ConfigError, NotFiniteError
from dcnseg.inference import regions as regions_module
from dcnseg.inference.batch import predict_files
from dcnseg.inference.inputs import find_inputs
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.regions import Region, Window, remove_regions
from dcnseg.inference.sliding_window import compute_window_starts
from dcnseg.models.region_head import decode_boxes
from dcnseg.models.segmenter import build_segmenter
from dcnseg.scoring.objects import find_objects
from tests.region_network import (
    CLASSES,
    MODEL,
    build_region_predictor,
    get_votes,
    make_image,
    save_region_weights,
)

Pixels = set[tuple[int, int]]
IMAGE = make_image(96, 160)


def predict(predictor: Predictor, image: np.ndarray = IMAGE) -> tuple[Prediction, Any, np.ndarray]:
    """Predict with regions; returns those, never None, beside the prediction."""
    prediction = predictor.predict(image, regions=True)
    assert prediction.region_numbers is not None
    assert prediction.regions
    return prediction, prediction.regions, prediction.region_numbers


def neighbors(pixel: tuple[int, int]) -> Pixels:
    row, column = pixel
    return {(row + y, column + x) for y in (-1, 0, 1) for x in (-1, 0, 1)} - {pixel}


def find_components(labels: np.ndarray) -> dict[int, list[Pixels]]:
    """The components of every class, pixel by pixel."""
    found: dict[int, list[Pixels]] = {}
    height, width = labels.shape
    left = {(y, x): int(labels[y, x]) for y in range(height) for x in range(width)}
    while left:
        first, value = next(iter(left.items()))
        component, border = {first}, [first]
        del left[first]
        while border:
            for pixel in neighbors(border.pop()):
                if left.get(pixel) == value:
                    del left[pixel]
                    component.add(pixel)
                    border.append(pixel)
        found.setdefault(value, []).append(component)
    return found


@pytest.mark.parametrize(
    ("image", "input_scale", "window"),
    [(IMAGE, 1.0, 1024), (IMAGE, 1.0, 64), (make_image(150, 301), 0.5, 64)],
)
def test_regions_are_the_components_of_the_label_map(
    image: np.ndarray, input_scale: float, window: int
) -> None:
    predictor = build_region_predictor(PredictConfig(window=window), input_scale)
    prediction, regions, numbers = predict(predictor, image)
    assert prediction.confidence is not None
    components = find_components(prediction.labels)
    del components[0]  # the background
    expected = {
        index: [c for c in all_ if len(c) >= 40 / input_scale**2]
        for index, all_ in components.items()
    }
    assert any(len(expected[index]) < len(components[index]) for index in (1, 2))
    order = [(r.class_index, r.box_xyxy[1], r.box_xyxy[0]) for r in regions]
    assert order == sorted(order)
    for number, region in enumerate(regions, 1):
        pixels = set(zip(*map(np.ndarray.tolist, np.nonzero(numbers == number)), strict=True))
        expected[region.class_index].remove(pixels)
        assert region.area == len(pixels)
        rows, columns = zip(*pixels, strict=True)
        box = (min(columns), min(rows), max(columns) + 1, max(rows) + 1)
        assert region.box_xyxy == box
        mean = np.mean([float(prediction.confidence[pixel]) for pixel in pixels])
        assert region.confidence == pytest.approx(mean)
    assert expected == {1: [], 2: []}


def choose_window(
    box: tuple[int, ...], size_hw: tuple[int, ...], side: int, overlap: float
) -> tuple[int, int, int, int]:
    """The window with the largest part of a box, then the nearest center, as a box."""
    height, width = size_hw
    h, w = min(side, height), min(side, width)
    ranked = []
    for top in compute_window_starts(height, h, overlap):
        for left in compute_window_starts(width, w, overlap):
            part_w = max(0, min(box[2], left + w) - max(box[0], left))
            part_h = max(0, min(box[3], top + h) - max(box[1], top))
            x, y = (box[0] + box[2] - 2 * left - w) / 2, (box[1] + box[3] - 2 * top - h) / 2
            ranked.append((-part_w * part_h, float(np.hypot(x, y)), (left, top, left + w, top + h)))
    return min(ranked)[2]


@torch.inference_mode()
def score_by_hand(predictor: Predictor, image: np.ndarray, region: Region) -> tuple[Tensor, Tensor]:
    """The probabilities and the refined box of a region, from a crop of the image."""
    config, head = predictor.config, predictor.region_head()
    side = round(config.window / predictor.preprocessing.input_scale)
    window = choose_window(region.box_xyxy, image.shape[:2], side, config.overlap)
    x = predictor.prepare(image[window[1] : window[3], window[0] : window[2]])
    fused = head.fuse(predictor.model._encode(x))
    corner, end = torch.tensor([*window[:2]] * 2), torch.tensor([*window[2:]] * 2)
    scale = torch.tensor([x.shape[3], x.shape[2]] * 2) / (end - corner)
    box = torch.tensor(region.box_xyxy)
    local = (box.maximum(corner).minimum(end) - corner) * scale
    output = head(fused, [local[None].float()])
    whole = decode_boxes((box - corner)[None] * scale, output.deltas)[0] / scale + corner
    size = torch.tensor([image.shape[1], image.shape[0]] * 2)
    return output.logits[0].softmax(dim=0), whole.clamp(min=0).minimum(size)


AUGMENTED = {"flip": True, "scales": (0.75, 1.0)}


@pytest.mark.parametrize(
    ("image", "config", "input_scale"),
    [
        (IMAGE, PredictConfig(), 1.0),
        (make_image(75, 101), PredictConfig(), 0.5),  # the scales of rows and columns differ
        (IMAGE, PredictConfig(window=64), 1.0),
        (make_image(150, 301), PredictConfig(window=64, overlap=0.5), 0.5),
        (IMAGE, PredictConfig(window=64, flip=True), 1.0),
        (IMAGE, PredictConfig(**AUGMENTED), 1.0),  # type: ignore[arg-type]
        (IMAGE, PredictConfig(window=64, scales=(1.25,)), 1.0),  # without the plain view
    ],
)
def test_scores_are_those_of_the_region_head_in_one_window(
    image: np.ndarray, config: PredictConfig, input_scale: float
) -> None:
    predictor = build_region_predictor(config, input_scale)
    _, regions, _ = predict(predictor, image)
    for region in regions:
        probabilities, refined = score_by_hand(predictor, image, region)
        expected = float(probabilities[region.class_index]) * region.confidence
        assert region.score == pytest.approx(expected, abs=1e-5)
        assert region.refined_box_xyxy == pytest.approx(refined.tolist(), abs=1e-3)
        assert region.voted_score == pytest.approx(float(probabilities.max()), abs=1e-5)
        best = int(probabilities.argmax())
        assert region.voted_index == (None if best == CLASSES.num_classes else best)
    assert len({round(region.score, 3) for region in regions}) > 2


def test_maps_of_many_windows_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = build_region_predictor(PredictConfig(window=64, flip=True))
    kept = predict(predictor)[1]
    again: list[Window] = []
    compute = predictor._compute_region_map

    def note(pixels: np.ndarray, window: Window) -> Tensor:
        again.append(window)
        return compute(pixels, window)

    monkeypatch.setattr(predictor, "_compute_region_map", note)
    assert predict(predictor)[1] == kept
    assert not again
    monkeypatch.setattr(regions_module, "MAX_KEPT_MAPS", 0)
    assert predict(predictor)[1] == kept
    assert len(again) == len(set(again)) > 1


def test_regions_are_pooled_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = build_region_predictor(PredictConfig(window=64))
    expected = predict(predictor)[1]
    monkeypatch.setattr(regions_module, "BATCH", 1)
    monkeypatch.setattr(regions_module, "ROWS", 7)
    for region, other in zip(expected, predict(predictor)[1], strict=True):
        assert region.score == pytest.approx(other.score)
        assert region.confidence == pytest.approx(other.confidence)


@torch.no_grad()
def test_no_object_has_no_index() -> None:
    predictor = build_region_predictor()
    bins = MODEL.region_bins**2
    get_votes(predictor.model).get_parameter("score_maps.bias")[CLASSES.num_classes * bins :] = 50
    for region in predict(predictor)[1]:
        assert region.voted_index is None
        assert region.voted_score == pytest.approx(1)
        assert region.score == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_refined_boxes_are_clipped_to_the_image() -> None:
    predictor = build_region_predictor(PredictConfig(window=64))
    get_votes(predictor.model).get_parameter("box_maps.bias").view(4, -1)[2:] = 50
    for region in predict(predictor)[1]:
        assert region.refined_box_xyxy == (0, 0, 160, 96)


@torch.no_grad()
def test_output_of_the_head_that_is_not_finite_is_an_error() -> None:
    predictor = build_region_predictor()
    get_votes(predictor.model).box_maps.weight.fill_(3e38)
    predictor.predict(IMAGE)
    with pytest.raises(NotFiniteError, match=r"not finite \(NaN or infinity\)"):
        predictor.predict(IMAGE, regions=True)


def test_an_image_without_objects_has_no_regions() -> None:
    predictor = build_region_predictor()
    with torch.no_grad():
        predictor.model.segmentation_head[0].bias[0] = 1e4  # type: ignore[index]
    prediction = predictor.predict(IMAGE, regions=True)
    assert prediction.regions == ()
    assert prediction.region_numbers is not None
    assert not prediction.region_numbers.any()


def test_pixels_below_the_minimum_confidence_belong_to_no_region() -> None:
    predictor = build_region_predictor(PredictConfig(min_confidence=0.5))
    prediction, regions, numbers = predict(predictor)
    assert not numbers[prediction.labels == 255].any()
    assert min(region.confidence for region in regions) >= 0.5


def test_predictions_without_regions_are_the_same() -> None:
    predictor = build_region_predictor(PredictConfig(window=64, flip=True))
    plain = predictor.predict(IMAGE, with_probabilities=True)
    assert (plain.regions, plain.region_numbers, plain.confidence) == (None, None, None)
    (other,) = predictor.predict_batch([IMAGE], regions=True, with_probabilities=True)
    np.testing.assert_array_equal(other.labels, plain.labels)
    np.testing.assert_array_equal(other.probabilities, plain.probabilities)
    assert other.regions


def test_mask_and_name_of_a_region() -> None:
    predictor = build_region_predictor()
    prediction, regions, _ = predict(predictor)
    for index, region in enumerate(regions):
        mask = prediction.region_mask(index)
        assert mask.dtype == bool
        assert mask.sum() == region.area
        assert (prediction.labels[mask] == region.class_index).all()
        assert prediction.region_name(index) == ("background", "car", "tree")[region.class_index]
    np.testing.assert_array_equal(prediction.region_mask(-1), mask)
    assert prediction.region_name(-1) == "tree"
    for call in (prediction.region_mask, prediction.region_name):
        with pytest.raises(IndexError):
            call(len(regions))
    plain = replace(prediction, regions=None)
    for call in (plain.region_mask, plain.region_name):
        with pytest.raises(ConfigError, match="no regions; call predict with regions=True"):
            call(0)


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_regions_below_the_minimum_score_are_removed(position: float) -> None:
    prediction, regions, _ = predict(build_region_predictor())
    scores = sorted(region.score for region in regions)
    least = scores[round(position * (len(scores) - 1))]  # that of a region, which is kept
    filtered = build_region_predictor(PredictConfig(min_region_score=least)).predict(IMAGE)
    kept = [index for index, region in enumerate(regions) if region.score >= least]
    assert 1 <= len(kept) <= len(regions)
    assert filtered.regions == tuple(regions[index] for index in kept)
    for new, old in enumerate(kept):
        mask = prediction.region_mask(old)
        np.testing.assert_array_equal(filtered.region_mask(new), mask)
        assert (filtered.labels[mask] == regions[old].class_index).all()
    assert filtered.region_numbers is not None
    assert filtered.region_numbers.max() == len(kept)
    expected = prediction.labels.copy()
    objects = find_objects(expected, (1, 2), MODEL.region_min_area)
    remove_regions(expected, objects, np.array([region.score < least for region in regions]))
    np.testing.assert_array_equal(filtered.labels, expected)
    assert (filtered.labels != prediction.labels).any() == (position > 0)


def test_regions_need_a_region_head(tmp_path: Path) -> None:
    """The errors come before an image is read, or a file is written."""
    model = build_segmenter(replace(MODEL, region_head="none"), CLASSES.num_classes)

    def build(config: PredictConfig | None = None) -> Predictor:
        return Predictor(model, CLASSES, Preprocessing(), device=torch.device("cpu"), config=config)

    text = r"no region head, .*Train one with --region-head deformable-rfcn"
    with pytest.raises(ConfigError, match=text):
        build().predict(tmp_path / "missing.png", regions=True)
    with pytest.raises(ConfigError, match=text):
        build(PredictConfig(min_region_score=0.1))
    inputs = find_inputs([str(tmp_path / "missing.png")])
    with pytest.raises(ConfigError, match=text):
        predict_files(build(), inputs, tmp_path / "out", ("labels", "regions"))
    assert not (tmp_path / "out").exists()
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"--min-region-score is .*; expected at least 0"):
            PredictConfig(min_region_score=value)


def test_weights_file_keeps_the_region_head(tmp_path: Path) -> None:
    weights = save_region_weights(tmp_path / "regions.safetensors")
    loaded = Predictor.from_checkpoint(weights, device="cpu")
    for region, expected in zip(
        predict(loaded)[1], predict(build_region_predictor())[1], strict=True
    ):
        assert region.box_xyxy == expected.box_xyxy
        assert region.score == pytest.approx(expected.score, abs=1e-5)


def remove_slowly(labels: np.ndarray, numbers: np.ndarray, is_removed: list[bool]) -> np.ndarray:
    """The reference of `remove_regions`, pixel by pixel."""
    labels = labels.copy()
    objects: dict[int, list[tuple[int, ...]]] = {}
    for pixel, number in np.ndenumerate(numbers):
        objects.setdefault(int(number), []).append(pixel)
    waiting = [number for number, removed in enumerate(is_removed, 1) if removed]
    waiting.sort(key=lambda number: (len(objects[number]), number))

    def fill(number: int) -> bool:
        around = {other for pixel in objects[number] for other in neighbors(pixel)}  # type: ignore[arg-type]
        seen: Counter[int] = Counter()
        for row, column in around:
            is_inside = 0 <= row < labels.shape[0] and 0 <= column < labels.shape[1]
            if is_inside and numbers[row, column] not in {number, *waiting}:
                seen[int(labels[row, column])] += 1
        del seen[255]
        if not seen:
            return False
        most = max(seen.values())
        for pixel in objects[number]:
            labels[pixel] = min(label for label, count in seen.items() if count == most)
        return True

    is_stuck = False
    while not is_stuck:
        is_stuck = True
        for number in list(waiting):
            if fill(number):
                waiting.remove(number)
                is_stuck = False
    while waiting:
        fill(waiting[-1])
        waiting.pop()
    return labels


SMALL_MAPS = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 1, 2, 2, 3, 255]))
)


@given(SMALL_MAPS, st.integers(1, 3), st.integers(0, 2**16 - 1), st.booleans())
@example(np.array([[1, 1, 1, 2]], np.uint8), 1, 2**16 - 1, False)
def test_removed_regions_get_the_class_around_them(
    labels: np.ndarray, min_area: int, bits: int, has_background: bool
) -> None:
    classes = (1, 2, 3) if has_background else (0, 1, 2, 3)
    objects = find_objects(labels, classes, min_area)
    is_removed = [bool(bits >> i % 16 & 1) for i in range(len(objects))]
    expected = remove_slowly(labels, objects.numbers, is_removed)
    actual = labels.copy()
    remove_regions(actual, objects, np.array(is_removed, bool))
    np.testing.assert_array_equal(actual, expected)
    is_other = ~np.isin(objects.numbers, 1 + np.flatnonzero(is_removed))
    np.testing.assert_array_equal(actual[is_other], labels[is_other])


def remove(rows: list[list[int]], *removed: int) -> list[list[int]]:
    """Remove all components of some classes from a label map."""
    labels = np.array(rows, np.uint8)
    objects = find_objects(labels, (0, 1, 2, 3), min_area=1)
    remove_regions(labels, objects, np.isin(objects.class_indices, removed))
    return labels.tolist()  # type: ignore[no-any-return]


NESTED = [[0, 1, 1, 1, 0], [0, 1, 2, 1, 0], [0, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("rows", "removed", "expected"),
    [
        ([[0, 0, 1, 2]], [1], [[0, 0, 0, 2]]),  # equally frequent: the first
        (NESTED, [2], [[0, 1, 1, 1, 0]] * 3),
        (NESTED, [1], [[0, 0, 0, 0, 0], [0, 0, 2, 0, 0], [0, 0, 0, 0, 0]]),
        (NESTED, [1, 2], [[0, 0, 0, 0, 0]] * 3),  # nothing of 1 is left within
        ([[0, 0, 1, 2, 2]], [1, 2], [[0, 0, 0, 0, 0]]),
        ([[1, 1], [1, 1]], [1], [[1, 1], [1, 1]]),  # fills the image
        ([[1, 1, 1], [2, 2, 3]], [1, 2, 3], [[1, 1, 1], [1, 1, 1]]),  # the largest is kept
        ([[0, 255, 1, 255, 0]], [1], [[0, 255, 1, 255, 0]]),  # among ignored pixels
        ([[1, 1, 255, 3, 2]], [1, 2, 3], [[1, 1, 255, 3, 3]]),
    ],
)
def test_removal_by_example(
    rows: list[list[int]], removed: list[int], expected: list[list[int]]
) -> None:
    assert remove(rows, *removed) == expected
