from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.data.transforms import JointTransform, Normalise, _place_axis, build_train_transform
from dcnseg.errors import ConfigError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def pair_that_says_where(height: int, width: int) -> tuple[Tensor, Tensor]:
    """A picture whose red channel equals the label map."""
    labels = torch.arange(height * width).reshape(height, width).remainder(200).to(torch.uint8)
    image = torch.stack([labels, torch.zeros_like(labels), torch.full_like(labels, 77)])
    return image, labels


def test_normalising_keeps_the_size() -> None:
    image, labels = pair_that_says_where(5, 7)
    values, indices = JointTransform(Normalise(MEAN, STD))(image, labels)
    expected = (image.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    torch.testing.assert_close(values, expected)
    assert type(values) is Tensor
    assert type(indices) is Tensor
    assert indices.dtype == torch.int64
    assert torch.equal(indices, labels.long())
    assert image.dtype == torch.uint8  # untouched


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans()
)
def test_picture_and_labels_stay_together(
    height: int, width: int, crop_h: int, crop_w: int, flip: bool
) -> None:
    transform = build_train_transform(
        crop_hw=(crop_h, crop_w), scale_range=(1, 1), flip=flip, mean=ZERO, std=ONE
    )
    image, labels = transform(*pair_that_says_where(height, width))
    assert image.shape == (3, crop_h, crop_w)
    assert labels.shape == (crop_h, crop_w)
    is_picture = labels != 255
    assert int(is_picture.sum()) == min(height, crop_h) * min(width, crop_w)
    torch.testing.assert_close((image[0] * 255)[is_picture], labels[is_picture].float())
    assert not image[:, ~is_picture].any()  # the mean colour, here black


def test_padding_is_the_mean_colour_and_ignored() -> None:
    transform = build_train_transform(crop_hw=(8, 8), scale_range=(1, 1), mean=MEAN, std=STD)
    image, labels = transform(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(2, 2).byte())
    assert int((labels == 255).sum()) == 60
    assert image[:, labels == 255].abs().max() < 0.01  # normalised: 0, up to rounding to uint8


@given(
    st.integers(1, 300), st.integers(1, 300), st.floats(0.1, 4), st.floats(0, 1, exclude_max=True)
)
def test_the_crop_lies_in_the_picture(size: int, crop: int, scale: float, place: float) -> None:
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
    transform = build_train_transform(
        crop_hw=(96, 96), scale_range=(0.5, 2.0), flip=True, mean=ZERO, std=ONE
    )
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


def test_every_place_and_both_directions_occur() -> None:
    transform = build_train_transform(crop_hw=(1, 2), scale_range=(1, 1), mean=ZERO, std=ONE)
    image, labels = pair_that_says_where(2, 3)
    torch.manual_seed(0)
    seen = {tuple(transform(image, labels)[1].flatten().tolist()) for _ in range(100)}
    rows = [(0, 1), (1, 2), (3, 4), (4, 5)]
    assert seen == {*rows, *((b, a) for a, b in rows)}


def test_colour_jitter_changes_the_picture_only() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8))
    labels = image[0] % 3
    transform = build_train_transform(
        crop_hw=(8, 8), scale_range=(1, 1), flip=False, colour_jitter=0.5, mean=ZERO, std=ONE
    )
    torch.manual_seed(0)
    values, indices = transform(image, labels)
    assert torch.equal(indices, labels.long())
    assert (values - image / 255).abs().mean() > 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_hw": (0, 8)}, r"`crop_hw` is \(0, 8\)"),
        ({"scale_range": (2.0, 0.5)}, r"`scale_range` is \(2\.0, 0\.5\)"),
        ({"scale_range": (0.0, 1.0)}, r"`scale_range` is \(0\.0, 1\.0\)"),
        ({"colour_jitter": 1.5}, r"`colour_jitter` is 1\.5"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    settings_: dict[str, object] = {"crop_hw": (8, 8), "mean": MEAN, "std": STD, **options}
    with pytest.raises(ConfigError, match=message):
        build_train_transform(**settings_)  # type: ignore[arg-type]
