from __future__ import annotations

import numpy as np

from dcnseg.data.synthetic import SCENE_CLASSES, generate_scene
from dcnseg.visualize.previews import (
    CELL_WIDTH,
    FALSE_ALARM,
    GAP,
    MISSED,
    PredictedSample,
    draw_error_map,
    draw_preview,
    draw_training_batch,
)

WIDTH = 4 * CELL_WIDTH + 5 * GAP


def test_errors_are_those_of_the_rarer_class() -> None:
    image = np.full((1, 6, 3), 100, np.uint8)
    labels = np.array([[0, 1, 0, 1, 2, 255]], np.uint8)
    predicted = np.array([[0, 0, 1, 2, 1, 0]], np.uint8)
    drawn = draw_error_map(image, labels, predicted, np.array([90, 20, 5]))
    assert drawn[0, 1].tolist() == list(MISSED)
    assert drawn[0, 2].tolist() == list(FALSE_ALARM)
    assert drawn[0, 3].tolist() == list(FALSE_ALARM)  # of the rarer class 2
    assert drawn[0, 4].tolist() == list(MISSED)
    assert len({tuple(pixel) for pixel in drawn[0, [0, 5]].tolist()}) == 1  # gray: correct, ignored
    assert len(set(drawn[0, 0].tolist())) == 1


def test_a_preview_has_a_row_per_sample() -> None:
    image, labels = generate_scene(1, (60, 80))
    samples = [PredictedSample(f"row {i}", image, labels, labels) for i in range(3)]
    counts = np.array([9, 3, 2, 1])
    one, three = (
        draw_preview(samples[:1], SCENE_CLASSES, counts),
        draw_preview(samples, SCENE_CLASSES, counts),
    )
    assert one.shape[1] == three.shape[1] == WIDTH
    row = CELL_WIDTH * 60 // 80
    assert len(three) - len(one) == 2 * (row + GAP + 30)
    assert draw_preview([], SCENE_CLASSES, counts).shape[1] == WIDTH


def test_a_batch_is_drawn_with_its_masks() -> None:
    scenes = [generate_scene(seed, (64, 64)) for seed in range(5)]
    images, labels = zip(*scenes, strict=True)
    drawn = draw_training_batch(images, labels, SCENE_CLASSES)
    assert drawn.shape[1] == WIDTH
    assert len(drawn) > 4 * CELL_WIDTH  # two rows of images, each above its masks
