from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dcnseg.checkpoint import TrainingDataStats
from dcnseg.data.image_io import is_gray
from dcnseg.inference.image_stats import compare_with_training, summarize_training_images

COLORS = np.arange(300 * 400 * 3, dtype=np.uint32).reshape(300, 400, 3).astype(np.uint8)
GRAYS = np.repeat(COLORS[..., :1], 3, axis=2)


def test_summarize_training_images(tmp_path: Path) -> None:
    paths = []
    for index in range(40):
        path = tmp_path / f"{index:02}.png"
        Image.fromarray((GRAYS if index % 4 == 0 else COLORS)[: 20 + index, :50]).save(path)
        paths.append(path)
    stats = summarize_training_images(paths)
    assert stats.num_images == 40
    assert stats.min_size_hw == (20, 50)
    assert 55 <= stats.max_size_hw[0] <= 59
    assert 0 < stats.gray_share < 1
    assert summarize_training_images(paths[:1]) == TrainingDataStats(1, (20, 50), (20, 50), 1.0)


@pytest.mark.parametrize(
    ("image", "max_side", "gray_share", "expected"),
    [
        (COLORS[:100, :100], 200, 0.5, ()),
        (COLORS[:50, :50], 200, 0.5, ()),
        (COLORS[:49, :49], 200, 0.5, ("smaller",)),
        (COLORS[:1, :1], 200, 0.5, ("smaller",)),
        (COLORS[:240, :110], 200, 0.5, ()),
        (COLORS, 200, 0.5, ()),
        (COLORS, 100, 0.5, ("larger",)),
        (GRAYS, 200, 0.0, ("gray",)),
        (COLORS, 200, 0.0, ()),
        (COLORS, 200, 1.0, ("colored",)),
        (GRAYS, 200, 1.0, ()),
        (GRAYS, 200, 0.2, ()),
        (COLORS, 200, 0.9, ()),
    ],
)
def test_compare_with_training(
    image: npt.NDArray[np.uint8], max_side: int, gray_share: float, expected: tuple[str, ...]
) -> None:
    stats = TrainingDataStats(9, (100, 100), (max_side, max_side), gray_share)
    assert compare_with_training(image, stats) == expected


def test_image_with_a_single_colored_pixel_is_not_gray() -> None:
    image = GRAYS.copy()
    image[203, 17, 2] ^= 1
    assert is_gray(GRAYS)
    assert not is_gray(image)
