"""The regions to learn from, compared with loops over objects, and the loss of the region head."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from dcnseg.config import DataConfig, ModelConfig, TrainConfig
from dcnseg.engine.loading import BatchGroup
from dcnseg.engine.optim import build_loss
from dcnseg.engine.region_objective import (
    RegionObjective,
    RegionTargets,
    _random_boxes,
    build_region_objective,
)
from dcnseg.engine.state import build_state
from dcnseg.engine.step import StepOutcome, TrainingStep
from dcnseg.models.region_head import RegionOutput, decode_boxes
from dcnseg.models.segmenter import build_segmenter
from tests.engine.runs import CPU
from tests.scoring.test_objects import regions

Labels = npt.NDArray[np.uint8]

CLASSES, NUM_CLASSES, MIN_AREA = (1, 2), 3, 20  # class 0 has no objects
NO_OBJECT, UNKNOWN = NUM_CLASSES, -100
MODEL = ModelConfig(
    encoder="resnet18",
    encoder_depth=3,
    architecture="plain",
    region_head="deformable-rfcn",
    region_min_area=MIN_AREA,
)


class Thing(NamedTuple):
    """An object of a label map."""

    class_index: int
    box: tuple[float, ...]  # left, top, right, bottom; the last two exclusive
    coarse: frozenset[tuple[int, int]]  # its pixels of every fourth row and column, in fours


def objective(
    *, min_area: int = MIN_AREA, weight: float = 1.0, has_ohem: bool = False
) -> RegionObjective:
    return RegionObjective(CLASSES, NUM_CLASSES, min_area, weight, has_ohem)


def find_things(labels: Labels, min_area: int, stride: int = 1) -> list[Thing]:
    """The objects by flood fill."""
    found = []
    for index in CLASSES:
        for region in regions(labels == index):
            if len(region) >= min_area:
                y, x = zip(*region, strict=True)
                box = min(x), min(y), max(x) + 1, max(y) + 1
                step = 4 // stride
                coarse = frozenset(
                    (row // step, column // step)
                    for row, column in region
                    if row % step == column % step == 0
                )
                found.append(Thing(index, tuple(float(stride * side) for side in box), coarse))
    return found


def find_guesses(predicted: Labels) -> list[Thing]:
    """The predicted objects, on every fourth pixel."""
    return find_things(predicted[::4, ::4], MIN_AREA // 16, stride=4)


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (one, other)]
    return shared / (sum(areas) - shared)


def mask_iou(guess: Thing, thing: Thing) -> float:
    """The IoU of a predicted object and an object, on every fourth pixel."""
    shared = len(guess.coarse & thing.coarse)
    return shared / (len(guess.coarse) + len(thing.coarse) - shared)


def is_mostly_ignored(labels: Labels, box: Sequence[float]) -> bool:
    height, width = labels.shape
    left, top, right, bottom = (round(side) for side in box)
    pixels = [
        int(labels[y, x])
        for y in range(max(top, 0), min(bottom, height))
        for x in range(max(left, 0), min(right, width))
    ]
    return 2 * pixels.count(255) > len(pixels)


def to_logits(predicted: Labels) -> Tensor:
    """Logits whose largest are those of the predicted classes, [B, K, H, W]."""
    return 5.0 * F.one_hot(torch.from_numpy(predicted).long(), NUM_CLASSES).movedim(3, 1).float()


def sample(
    labels: Labels, predicted: Labels, seed: int = 0, **changes: Any
) -> tuple[RegionTargets, list[list[tuple[tuple[float, ...], int, tuple[float, ...]]]]]:
    """Sample regions; also returns the (box, class, refined box) of the regions of each image."""
    torch.manual_seed(seed)
    maps = torch.from_numpy(labels).long()
    targets = objective(**changes).sample(maps, to_logits(predicted))
    boxes = torch.cat(targets.boxes)
    refined = decode_boxes(boxes, targets.deltas)
    rows = zip(
        map(tuple, boxes.tolist()),
        targets.classes.tolist(),
        map(tuple, refined.tolist()),
        strict=True,
    )
    found = list(rows)
    counts = [len(of_image) for of_image in targets.boxes]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return targets, [found[start : start + n] for start, n in zip(starts, counts, strict=True)]


@st.composite
def label_maps(draw: st.DrawFn, size_hw: tuple[int, int], values: Sequence[int]) -> Labels:
    """Blocks, which form objects of any shape, cut at the edges of the image, and single pixels."""
    height, width = size_hw
    side = draw(st.integers(4, 17))
    shape = height // side + 2, width // side + 2
    blocks = draw(arrays(np.uint8, shape, elements=st.sampled_from(values)))
    top, left = draw(st.tuples(*[st.integers(0, side - 1)] * 2))
    whole = np.kron(blocks, np.ones((side, side), np.uint8))
    labels = whole[top : top + height, left : left + width].copy()
    places = st.tuples(st.integers(0, height - 1), st.integers(0, width - 1))
    for y, x in draw(st.lists(places, max_size=4)):
        labels[y, x] = draw(st.sampled_from(values))
    return labels


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Labels, Labels]:
    """Labels and predictions of two images, [2, H, W]; some predictions are right."""
    size_hw = draw(st.tuples(st.integers(5, 40), st.integers(5, 40)))
    labels: list[Labels] = []
    predicted: list[Labels] = []
    for _ in range(2):
        labels.append(draw(label_maps(size_hw, (0, 0, 1, 2, 255))))
        right = np.where(labels[-1] == 255, np.uint8(0), labels[-1])
        swapped = np.array([0, 2, 1], np.uint8)[right]
        other = label_maps(size_hw, (0, 0, 1, 2))
        predicted.append(draw(st.just(right) | st.just(swapped) | other))
    return np.stack(labels), np.stack(predicted)


@settings(max_examples=60)
@given(scene=scenes(), seed=st.integers(0, 9), has_ohem=st.booleans())
def test_regions_are_what_their_classes_and_deltas_say(
    scene: tuple[Labels, Labels], seed: int, has_ohem: bool
) -> None:
    targets, images = sample(*scene, seed, has_ohem=has_ohem)
    count = 128 if has_ohem else 64
    assert [len(boxes) for boxes in targets.boxes] == [count] * 2
    assert not targets.deltas[(targets.classes == NO_OBJECT) | (targets.classes < 0)].any()
    for labels, predicted, found in zip(*scene, images, strict=True):
        things, guesses = find_things(labels, MIN_AREA), find_guesses(predicted)
        start = 3 * count // 8 if things else 0
        stop = start + min(len(guesses), 3 * count // 8)
        for i, (box, class_index, refined) in enumerate(found):
            is_guess = start <= i < stop
            ious = (
                [[mask_iou(g, thing) for thing in things] for g in guesses if g.box == box]
                if is_guess
                else [[iou(box, thing.box) for thing in things]]
            )
            if any(0 < abs(value - 0.5) < 1e-6 for values in ious for value in values):
                continue  # differs in float32
            is_ignored = is_mostly_ignored(labels, box)
            assert any(
                is_target(class_index, refined, things, values, is_ignored=is_ignored)
                for values in ious
            )


def is_target(
    class_index: int,
    refined: Sequence[float],
    things: Sequence[Thing],
    ious: Sequence[float],
    *,
    is_ignored: bool,
) -> bool:
    """Whether a region with these IoUs has this class and refined box."""
    if max(ious, default=0.0) < 0.5:
        return class_index == (UNKNOWN if is_ignored else NO_OBJECT)
    return any(
        thing.class_index == class_index
        and value > max(ious) - 1e-6
        and np.allclose(refined, thing.box, atol=1e-3)
        for value, thing in zip(ious, things, strict=True)
    )


@settings(max_examples=60)
@given(scene=scenes(), seed=st.integers(0, 9), has_ohem=st.booleans())
def test_objects_and_predicted_objects_get_regions(
    scene: tuple[Labels, Labels], seed: int, has_ohem: bool
) -> None:
    _, images = sample(*scene, seed, has_ohem=has_ohem)
    for labels, predicted, found in zip(*scene, images, strict=True):
        things, guesses = find_things(labels, MIN_AREA), find_guesses(predicted)
        positive = [class_index for _, class_index, _ in found if class_index in CLASSES]
        assert len(positive) >= (0 if not things else 48 if has_ohem else 24)
        assert things or not positive
        if len(guesses) <= 24:
            for guess in guesses:
                classes = [class_index for box, class_index, _ in found if box == guess.box]
                assert classes
                is_right = any(
                    thing.class_index == guess.class_index and mask_iou(guess, thing) >= 0.5
                    for thing in things
                )
                assert (guess.class_index in classes) >= is_right


def blank(height: int = 64, width: int = 96) -> Labels:
    return np.zeros((1, height, width), np.uint8)


def test_at_most_three_in_eight_regions_are_predicted_objects() -> None:
    predicted = blank()
    for y in range(0, 64, 8):
        for x in range(0, 96, 8):
            predicted[0, y : y + 4, x : x + 4] = 1
    guesses = {thing.box for thing in find_guesses(predicted[0])}
    assert len(guesses) == 96
    for has_ohem, expected in ((False, 24), (True, 48)):
        _, (found,) = sample(blank(), predicted, has_ohem=has_ohem)
        assert len({box for box, _, _ in found} & guesses) == expected


def test_wrong_predicted_objects_are_no_objects() -> None:
    labels, predicted = blank(), blank()
    labels[0, 8:24, 8:24] = 1
    predicted[0, 32:48, 40:72] = 1
    predicted[0, 8:24, 18:40] = 1  # touches the object
    _, (found,) = sample(labels, predicted)
    classes = {box: class_index for box, class_index, _ in found}
    assert classes[40.0, 32.0, 72.0, 48.0] == NO_OBJECT
    assert classes[20.0, 8.0, 40.0, 24.0] == NO_OBJECT


def test_a_predicted_object_of_the_wrong_shape_is_no_object() -> None:
    """Their boxes are equal, but the object is a ring, and the predicted object is filled."""
    labels, predicted = blank(), blank()
    labels[0, 8:48, 8:48] = predicted[0, 8:48, 8:48] = 1
    labels[0, 12:44, 12:44] = 0
    _, (found,) = sample(labels, predicted)
    assert found[24][:2] == ((8, 8, 48, 48), NO_OBJECT)  # after 24 boxes near the object


def test_a_predicted_object_of_the_wrong_class_gets_the_class_of_the_object() -> None:
    labels, predicted = blank(), blank()
    labels[0, 8:48, 8:48] = 1
    predicted[0, 8:48, 8:40] = 2
    _, (found,) = sample(labels, predicted)
    assert {class_index for box, class_index, _ in found if box == (8, 8, 40, 48)} == {1}


def test_small_objects_are_no_regions() -> None:
    labels = blank()
    labels[0, 10:14, 10:15] = 1  # 20 pixels
    _, (found,) = sample(labels, blank(), min_area=20)
    assert 1 in {class_index for _, class_index, _ in found}
    _, (found,) = sample(labels, blank(), min_area=21)
    assert {class_index for _, class_index, _ in found} == {NO_OBJECT}


def test_ignored_pixels() -> None:
    """Half of the image is unknown; an object there is known nevertheless."""
    labels = blank(64, 64)
    labels[0, :, 32:] = 255
    labels[0, 24:32, 44:52] = 2
    predicted = blank(64, 64)
    predicted[0, 40:56, 40:60] = 1  # in the unknown half
    predicted[0, 40:56, 4:20] = 1  # in the known half
    _, (found,) = sample(labels, predicted)
    classes = {box: class_index for box, class_index, _ in found}
    assert classes[40.0, 40.0, 60.0, 56.0] == UNKNOWN
    assert classes[4.0, 40.0, 20.0, 56.0] == NO_OBJECT
    assert [class_index for _, class_index, _ in found].count(2) >= 24
    _, (found,) = sample(np.full_like(labels, 255), predicted)
    assert {class_index for _, class_index, _ in found} == {UNKNOWN}


def test_regions_depend_on_the_seed_only() -> None:
    labels, predicted = blank(), blank()
    labels[0, 8:48, 8:48] = predicted[0, 8:48, 8:40] = 1
    one, same, other = (sample(labels, predicted, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one.boxes[0], same.boxes[0])
    assert torch.equal(one.classes, same.classes)
    assert torch.equal(one.deltas, same.deltas)
    assert not torch.equal(one.boxes[0], other.boxes[0])


@given(
    size_hw=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    count=st.integers(0, 99),
    seed=st.integers(0, 99),
)
def test_boxes_elsewhere_are_within_the_image(
    size_hw: tuple[int, int], count: int, seed: int
) -> None:
    torch.manual_seed(seed)
    boxes = _random_boxes(count, size_hw)
    assert boxes.shape == (count, 4)
    assert (boxes >= 0).all()
    limit = torch.tensor([size_hw[1], size_hw[0]])
    assert (boxes[:, 2:] <= limit * (1 + 1e-6)).all()  # rounding in float32
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides >= 0.999 * limit.clamp(max=8 * math.exp(-0.7))).all()


def test_boxes_elsewhere_have_many_sizes_and_shapes() -> None:
    boxes = _random_boxes(1000, (400, 400))
    sides = boxes[:, 2:] - boxes[:, :2]
    area, aspect = sides.prod(dim=1).sqrt(), sides[:, 0] / sides[:, 1]
    assert [int(((low <= area) & (area < 2 * low)).sum()) > 50 for low in (8, 32, 128)] == [
        True
    ] * 3
    assert aspect.min() < 0.5
    assert aspect.max() > 2
    assert area.max() > 350
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert (centers.amin(dim=0) < 20).all()
    assert (centers.amax(dim=0) > 380).all()


def loop_loss(output: RegionOutput, targets: RegionTargets, *, has_ohem: bool) -> float:
    """Fast R-CNN's loss with lambda = 1, averaged over the regions that are known."""
    losses = []
    for logits, deltas, class_index, wanted in zip(
        output.logits.tolist(),
        output.deltas.tolist(),
        targets.classes.tolist(),
        targets.deltas.tolist(),
        strict=True,
    ):
        if class_index == UNKNOWN:
            losses.append(0.0)
            continue
        highest = max(logits)
        total = highest + math.log(sum(math.exp(logit - highest) for logit in logits))
        loss = total - logits[class_index]
        if class_index < NUM_CLASSES:
            for found, expected in zip(deltas, wanted, strict=True):
                distance = abs(found - expected)
                loss += 0.5 * distance**2 if distance < 1 else distance - 0.5
        losses.append(loss)
    count = sum(class_index != UNKNOWN for class_index in targets.classes.tolist())
    if has_ohem:
        losses = sorted(losses)[len(losses) - len(losses) // 2 :]
        count = min(count, len(losses))
    return float(sum(losses) / max(count, 1))


def random_output(classes: Sequence[int], scale: float = 2.0) -> tuple[RegionOutput, RegionTargets]:
    """Random outputs for these classes, with gradients, in float64."""
    count = len(classes)
    output = RegionOutput(
        (scale * torch.randn(count, NUM_CLASSES + 1, dtype=torch.float64)).requires_grad_(),
        (scale * torch.randn(count, 4, dtype=torch.float64)).requires_grad_(),
    )
    is_object = torch.tensor([[0 <= each < NUM_CLASSES] for each in classes])
    deltas = torch.where(is_object, torch.randn(count, 4, dtype=torch.float64), 0)
    return output, RegionTargets([torch.zeros(count, 4)], torch.tensor(classes), deltas)


@given(
    classes=st.lists(st.sampled_from([UNKNOWN, 0, 1, 2, NO_OBJECT]), min_size=1, max_size=20),
    scale=st.sampled_from([0.0, 0.1, 2.0, 300.0]),
    has_ohem=st.booleans(),
)
def test_loss_equals_a_loop(classes: list[int], scale: float, has_ohem: bool) -> None:
    output, targets = random_output(classes, scale)
    loss = objective(has_ohem=has_ohem).loss(output, targets)
    expected = loop_loss(output, targets, has_ohem=has_ohem)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    loss.backward()
    for tensor in output:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert not tensor.grad[targets.classes == UNKNOWN].any()
    assert output.deltas.grad is not None
    assert not output.deltas.grad[targets.classes == NO_OBJECT].any()


def test_ohem_learns_from_the_half_with_the_largest_losses() -> None:
    output, targets = random_output([0, NO_OBJECT, 2, UNKNOWN, 1, NO_OBJECT, 1, 0, NO_OBJECT, 2])
    each = [
        objective()
        .loss(
            RegionOutput(output.logits[i : i + 1], output.deltas[i : i + 1]),
            RegionTargets([], targets.classes[i : i + 1], targets.deltas[i : i + 1]),
        )
        .item()
        for i in range(10)
    ]
    objective(has_ohem=True).loss(output, targets).backward()
    assert output.logits.grad is not None
    learned = output.logits.grad.any(dim=1).nonzero()[:, 0].tolist()
    assert learned == sorted(sorted(range(10), key=lambda i: each[i])[5:])


def test_the_objective_is_that_of_the_settings() -> None:
    config = TrainConfig(
        DataConfig(Path("x")),
        replace(MODEL, region_min_area=99),
        region_weight=0.25,
        region_ohem=True,
    )
    built = build_region_objective(config, (1,), 3)
    assert built == RegionObjective((1,), 3, min_area=99, weight=0.25, has_ohem=True)
    plain = replace(config, model=replace(MODEL, region_head="none"))
    assert build_region_objective(plain, (1,), 3) is None


def random_batch() -> tuple[Tensor, Tensor]:
    """Two images of 64x64 with three objects; their colors are those of their classes."""
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[0, 6:30, 10:40] = 1
    labels[0, 40:60, 30:60] = 2
    labels[1, 20:50, 4:36] = 2
    colors = torch.tensor([[0.0, 0, 0], [2, -1, 0], [-1, 0, 2]])
    images = colors[labels].movedim(3, 1) + 0.3 * torch.randn(2, 3, 64, 64)
    return images.contiguous(), labels


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_weight_of_zero_leaves_the_gradient_of_the_encoder(weight: float) -> None:
    images, labels = random_batch()
    torch.manual_seed(1)
    plain = build_segmenter(replace(MODEL, region_head="none"), NUM_CLASSES).train()
    torch.manual_seed(1)
    model = build_segmenter(MODEL, NUM_CLASSES).train()
    F.cross_entropy(plain(images), labels).backward()
    logits, loss = objective(weight=weight).forward(model, images, labels)
    assert (loss.item() == 0) == (weight == 0)
    (F.cross_entropy(logits, labels) + loss).backward()
    same = [
        torch.equal(parameter.grad, grad)
        for name, parameter in model.named_parameters()
        if not name.startswith("region_head.")
        and parameter.grad is not None
        and (grad := plain.get_parameter(name).grad) is not None
    ]
    assert len(same) > 20
    if weight == 0:
        assert all(same)
        gradients = [p.grad for p in model.require_region_head().parameters()]
        assert not any(gradient.any() for gradient in gradients if gradient is not None)
    else:  # the segmentation head alone has the same gradient
        assert sum(same) == 2


def build_step(weight: float = 0.5, amp_dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A training step with regions, and its state."""
    data = DataConfig(Path("x"), crop_size=(64, 64))
    config = TrainConfig(data, MODEL, region_weight=weight, amp="off", lr=0.02, epochs=99)
    state = build_state(
        config, num_classes=NUM_CLASSES, updates_per_epoch=9, device=CPU, encoder_weights="none"
    )
    regions = build_region_objective(config, CLASSES, NUM_CLASSES)
    return TrainingStep(state, build_loss("ce", None), CPU, amp_dtype, regions), state


def test_a_training_step_adds_the_loss_of_the_regions() -> None:
    images, labels = random_batch()
    step, state = build_step(weight=0.5)
    before = copy.deepcopy(state.model).train()
    values: list[float] = []
    torch.manual_seed(4)
    outcome = step(BatchGroup(1, [(images, labels)]), lambda _size, value: values.append(value))
    assert outcome is StepOutcome.UPDATED
    torch.manual_seed(4)
    logits, loss = objective(weight=1.0).forward(before, images, labels)
    expected = F.cross_entropy(logits, labels) + 0.5 * loss
    assert values == [pytest.approx(expected.item(), rel=1e-5)]
    for name, parameter in before.require_region_head().named_parameters():
        assert not torch.equal(state.model.region_head.get_parameter(name), parameter), name


def test_a_training_step_in_bfloat16() -> None:
    batch = random_batch()
    values: list[float] = []
    for amp_dtype in (None, torch.bfloat16):
        torch.manual_seed(4)
        step, _ = build_step(amp_dtype=amp_dtype)
        torch.manual_seed(4)
        outcome = step(BatchGroup(1, [batch]), lambda _size, value: values.append(value))
        assert outcome is StepOutcome.UPDATED
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_the_regions_of_a_batch_are_learned() -> None:
    batch = random_batch()
    step, state = build_step(weight=1.0)
    state.model.train()
    for _ in range(40):
        assert step(BatchGroup(1, [batch])) is StepOutcome.UPDATED
    with torch.no_grad():
        sampled: list[RegionTargets] = []

        def propose(logits: Tensor) -> list[Tensor]:
            sampled.append(objective().sample(batch[1], logits))
            return sampled[0].boxes

        _, output = state.model(batch[0], propose)
    classes = sampled[0].classes
    is_object = (classes == 1) | (classes == 2)
    is_right = output.logits.argmax(dim=1) == classes
    assert is_right[is_object].float().mean() > 0.8
    assert is_right[~is_object].float().mean() > 0.6
    # The boxes are closer to those of the objects than before.
    distance = (output.deltas - sampled[0].deltas)[is_object].abs().mean()
    assert distance < 0.8 * sampled[0].deltas[is_object].abs().mean()
