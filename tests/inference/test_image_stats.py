from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcnseg.checkpoint import TrainingDataStats
from dcnseg.inference.image_stats import (
    differences_from_training,
    is_gray,
    summarize_training_images,
)

COLORS = np.arange(300 * 400 * 3, dtype=np.uint32).reshape(300, 400, 3).astype(np.uint8)
GRAYS = np.repeat(COLORS[..., :1], 3, axis=2)


def test_images_are_described(tmp_path: Path) -> None:
    paths = []
    for index in range(40):
        path = tmp_path / f"{index:02}.png"
        Image.fromarray((GRAYS if index % 4 == 0 else COLORS)[: 20 + index, :50]).save(path)
        paths.append(path)
    seen = summarize_training_images(paths)
    assert seen.num_images == 40
    assert seen.min_size_hw == (20, 50)
    assert 55 <= seen.max_size_hw[0] <= 59
    assert 0 < seen.gray_share < 1
    assert summarize_training_images(paths[:1]) == TrainingDataStats(1, (20, 50), (20, 50), 1.0)


@pytest.mark.parametrize(
    ("size_hw", "expected"),
    [
        ((100, 100), ()),
        ((50, 50), ()),
        ((49, 49), ("smaller",)),
        ((300, 400), ()),
        ((240, 110), ()),
        ((1, 1), ("smaller",)),
    ],
)
def test_only_a_great_difference_in_size_counts(
    size_hw: tuple[int, int], expected: tuple[str, ...]
) -> None:
    seen = TrainingDataStats(9, (100, 100), (200, 200), 0.5)
    assert differences_from_training(COLORS[: size_hw[0], : size_hw[1]], seen) == expected
    assert differences_from_training(COLORS, TrainingDataStats(9, (10, 10), (100, 100), 0.5)) == (
        "larger",
    )


@pytest.mark.parametrize(
    ("share", "image", "expected"),
    [
        (0.0, GRAYS, ("gray",)),
        (0.0, COLORS, ()),
        (1.0, COLORS, ("colored",)),
        (1.0, GRAYS, ()),
        (0.2, GRAYS, ()),
        (0.9, COLORS, ()),
    ],
)
def test_channels_count_where_the_training_saw_one_kind(
    share: float, image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], expected: tuple[str, ...]
) -> None:
    assert (
        differences_from_training(image, TrainingDataStats(9, (300, 400), (300, 400), share))
        == expected
    )


def test_a_single_colored_pixel_is_a_color() -> None:
    image = GRAYS.copy()
    image[203, 17, 2] ^= 1
    assert is_gray(GRAYS)
    assert not is_gray(image)
