from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dcnseg.data.transforms import (
    CustomAugmentation,
    JointTransform,
    Normalize,
    RandomTilt,
    _place_axis,
    build_train_transform,
    name_of,
)
from dcnseg.errors import ConfigError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
NOISE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 40), np.uint8))


def build(height: int, width: int, **options: Any) -> JointTransform:
    """A transform without scaling and normalization unless `options` say otherwise."""
    defaults: dict[str, Any] = {"scale_range": (1, 1), "flip": False, "mean": ZERO, "std": ONE}
    return build_train_transform(crop_hw=(height, width), **(defaults | options))


def indexed_pair(height: int, width: int) -> tuple[Tensor, Tensor]:
    """An image whose red channel equals the label map."""
    labels = torch.arange(height * width).reshape(height, width).remainder(200).to(torch.uint8)
    image = torch.stack([labels, torch.zeros_like(labels), torch.full_like(labels, 77)])
    return image, labels


def test_normalizing_keeps_the_size() -> None:
    image, labels = indexed_pair(5, 7)
    values, indices = JointTransform(Normalize(MEAN, STD))(image, labels)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    torch.testing.assert_close(values, (image.float() / 255 - mean) / std)
    assert type(values) is Tensor
    assert type(indices) is Tensor
    assert indices.dtype == torch.int64
    assert torch.equal(indices, labels.long())
    assert image.dtype == torch.uint8  # untouched


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
SEEDS = st.integers(0, 2**32)


@settings(max_examples=80, deadline=None)
@given(SIZES, SIZES, st.booleans(), st.booleans(), st.sampled_from([0, 90, 180]), SEEDS)
def test_image_and_labels_stay_together(
    size_hw: tuple[int, int],
    crop_hw: tuple[int, int],
    flip: bool,
    vertical_flip: bool,
    rotate: int,
    seed: int,
) -> None:
    transform = build(*crop_hw, flip=flip, vertical_flip=vertical_flip, rotate=rotate)
    torch.manual_seed(seed)
    image, labels = transform(*indexed_pair(*size_hw))
    assert image.shape == (3, *crop_hw)
    assert labels.shape == crop_hw
    is_image = labels != 255
    sizes = [size_hw, size_hw[::-1]] if rotate == 90 else [size_hw]
    assert int(is_image.sum()) in [min(h, crop_hw[0]) * min(w, crop_hw[1]) for h, w in sizes]
    torch.testing.assert_close((image[0] * 255)[is_image], labels[is_image].float())
    assert not image[:, ~is_image].any()  # the mean color, here black


def test_padding_is_the_mean_color_and_ignored() -> None:
    transform = build(8, 8, mean=MEAN, std=STD)
    image, labels = transform(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(2, 2).byte())
    assert int((labels == 255).sum()) == 60
    assert image[:, labels == 255].abs().max() < 0.01  # normalized: 0, up to rounding to uint8


@given(
    st.integers(1, 300), st.integers(1, 300), st.floats(0.1, 4), st.floats(0, 1, exclude_max=True)
)
def test_the_crop_lies_in_the_image(size: int, crop: int, scale: float, place: float) -> None:
    start, length, target, before, after = _place_axis(size, crop, scale, place)
    assert start >= 0
    assert length >= 1
    assert start + length <= size
    assert min(before, after) >= 0
    assert before + target + after == crop
    if crop >= 20 and length >= 20:
        assert target / length == pytest.approx(scale, rel=0.2)


def test_scaling_is_joint_and_keeps_labels_pure() -> None:
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[20:40, 30:60] = 9
    image = (labels * 20).expand(3, 64, 64)
    transform = build(96, 96, scale_range=(0.5, 2.0), flip=True)
    areas = set()
    for seed in range(12):
        torch.manual_seed(seed)
        values, indices = transform(image, labels)
        assert set(indices.unique().tolist()) <= {0, 9, 255}
        is_object = indices == 9
        areas.add(int(is_object.sum()))
        # Apart from the blended rim the object is bright exactly where the labels say so.
        is_bright = (values[0] * 255 > 90) & (indices != 255)
        assert int((is_bright ^ is_object).sum()) <= 200
    assert max(areas) > 2 * min(areas)


def test_every_crop_in_both_directions_occurs() -> None:
    torch.manual_seed(0)
    transform, pair = build(1, 2, flip=True), indexed_pair(2, 3)
    seen = {tuple(transform(*pair)[1].flatten().tolist()) for _ in range(100)}
    assert seen == {(0, 1), (1, 2), (3, 4), (4, 5), (1, 0), (2, 1), (4, 3), (5, 4)}


def test_color_jitter_changes_the_image_only() -> None:
    transform = build(40, 40, color_jitter=0.5)
    torch.manual_seed(0)
    values, indices = transform(NOISE, NOISE[0] % 3)
    assert torch.equal(indices, (NOISE[0] % 3).long())
    assert (values - NOISE / 255).abs().mean() > 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_hw": (0, 8)}, r"`crop_hw` is \(0, 8\)"),
        ({"scale_range": (2.0, 0.5)}, r"`scale_range` is \(2\.0, 0\.5\)"),
        ({"scale_range": (0.0, 1.0)}, r"`scale_range` is \(0\.0, 1\.0\)"),
        ({"color_jitter": 1.5}, r"`color_jitter` is 1\.5"),
        ({"rotate": 181}, r"`rotate` is 181; it must be in 0\.\.180 degrees"),
        ({"blur": -1}, r"`blur` is -1"),
        ({"blur": float("nan")}, r"`blur` is nan"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_train_transform(**{"crop_hw": (8, 8), "mean": MEAN, "std": STD, **options})


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"vertical_flip": True}, 2),
        ({"rotate": 180}, 2),
        ({"rotate": 90}, 4),
        ({"rotate": 90, "vertical_flip": True}, 8),
    ],
)
def test_every_position_occurs(options: dict[str, Any], count: int) -> None:
    transform = build(2, 2, **options)
    torch.manual_seed(0)
    seen = {tuple(transform(*indexed_pair(2, 2))[1].flatten().tolist()) for _ in range(150)}
    assert len(seen) == count


DEGREES = st.floats(0.1, 180).filter(lambda degrees: degrees % 90 != 0)


@settings(max_examples=25)
@given(st.integers(3, 24), st.integers(3, 24), DEGREES, SEEDS)
def test_a_tilted_crop_has_no_empty_corner_inside_the_image(
    height: int, width: int, degrees: float, seed: int
) -> None:
    """Where the labels are all one class, so is the crop, and the image stays what it is."""
    transform = build(height, width, flip=True, rotate=degrees)
    torch.manual_seed(seed)
    side = 2 * max(height, width) + 4
    sevens = torch.full((side, side), 7, dtype=torch.uint8)
    image, labels = transform((sevens + 193).expand(3, side, side), sevens)
    assert labels.shape == (height, width)
    assert bool((labels == 7).all())
    torch.testing.assert_close(image * 255, torch.full_like(image, 200), atol=1.01, rtol=0)


def test_a_tilt_turns_image_and_labels_alike() -> None:
    image = torch.zeros(3, 61, 61, dtype=torch.uint8)
    image[:, 20:41, 5:56] = 255
    labels = (image[0] > 0).byte()
    tilt = RandomTilt((61, 61), 40, [0, 0, 0])
    for seed in range(8):
        torch.manual_seed(seed)
        turned, mask = tilt(tv_tensors.Image(image), tv_tensors.Mask(labels))
        inside = mask != 255
        differs = (turned[0] > 127) != (mask == 1)
        assert float(differs[inside].float().mean()) < 0.01
        assert set(mask.unique().tolist()) <= {0, 1, 255}
        assert 0.9 < float((mask == 1).sum() / labels.sum()) <= 1.05


def test_blur_changes_every_other_image_and_no_label() -> None:
    transform = build(40, 40, blur=2)
    torch.manual_seed(0)
    results = [transform(NOISE, NOISE[0] % 3) for _ in range(60)]
    assert all(torch.equal(indices, (NOISE[0] % 3).long()) for _, indices in results)
    spreads = [float(values.std()) for values, _ in results]
    sharp = float((NOISE / 255).std())
    assert 15 < sum(spread == pytest.approx(sharp) for spread in spreads) < 45
    assert min(spreads) < 0.5 * sharp


@pytest.mark.parametrize("blur", [0.1, 10])
def test_blur_fits_the_smallest_crop(blur: float) -> None:
    transform = build(2, 2, scale_range=(0.5, 2.0), blur=blur)
    for seed in range(6):
        torch.manual_seed(seed)
        assert transform(*indexed_pair(5, 5))[0].isfinite().all()


def test_steps_that_are_off_draw_nothing() -> None:
    """Runs of versions without these steps must resume bit for bit."""
    off = {"vertical_flip": False, "rotate": 0.0, "blur": 0.0, "augment": None}
    torch.manual_seed(0)
    build(8, 8, scale_range=(0.5, 2.0), flip=True, color_jitter=0.3, **off)(*indexed_pair(9, 9))
    state = torch.get_rng_state()
    # Drawn by an earlier version: three numbers of the crop, one of the flip, seven of the colors.
    torch.manual_seed(0)
    torch.rand(3), torch.rand(1), torch.randperm(4)
    [torch.empty(1).uniform_(0.7, 1.3) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)


def draw_from_all(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    numbers = (random.random(), np.random.rand(), float(torch.rand(())))
    return image * 0 + torch.tensor([int(99 * n) for n in numbers]).byte()[:, None, None], labels


def generator_states() -> list[Any]:
    return [random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()]


def test_an_augmentation_of_ones_own_is_seeded_whatever_it_draws_from() -> None:
    transform = build(4, 4, flip=True, augment=draw_from_all)
    transform = pickle.loads(pickle.dumps(transform))
    values: list[list[float]] = []
    for seed in (1, 1, 2):
        random.seed(len(values))
        np.random.seed(len(values))
        before = generator_states()
        torch.manual_seed(seed)
        values.append(transform(*indexed_pair(6, 6))[0][:, 0, 0].tolist())
        assert generator_states() == before
    assert values[0] == values[1]
    assert all(one != other for one, other in zip(values[1], values[2], strict=True))


def test_transforms_of_torchvision_serve_as_they_are() -> None:
    augment = v2.RandomRotation((90, 90), fill={tv_tensors.Image: 0, tv_tensors.Mask: 255})
    transform = build(4, 6, augment=augment)
    image, labels = indexed_pair(6, 6)
    turned, indices = transform(image, labels)
    inside = indices != 255
    torch.testing.assert_close((turned[0] * 255)[inside], indices[inside].float())
    assert name_of(augment).endswith(".RandomRotation")
    assert name_of(draw_from_all) == f"{__name__}.draw_from_all"


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (None, "returned NoneType; expected the image and the label map"),
        ((1, 2), "returned 1 as the image"),
        ((torch.zeros(3, 4, 4), torch.zeros(4, 4).byte()), r"torch.float32 \[3, 4, 4\] as the im"),
        ((torch.zeros(3, 4, 4).byte(), torch.zeros(4, 5).byte()), r"\[4, 5\] as the label map"),
        ((torch.zeros(3, 4, 4).byte(), torch.zeros(4, 4)), "float32 .* as the label map"),
        ((torch.zeros(1, 4, 4).byte(), torch.zeros(4, 4).byte()), r"\[1, 4, 4\] as the image"),
        ((torch.zeros(3, 0, 4).byte(), torch.zeros(0, 4).byte()), "as the image"),
    ],
)
def test_what_an_augmentation_may_not_return(result: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=f"augmentation .*{text}"):
        CustomAugmentation(lambda _image, _labels: result)(torch.zeros(3, 4, 4), torch.zeros(4, 4))
