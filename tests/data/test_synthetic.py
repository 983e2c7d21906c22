from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from dcnseg.data.check.report import check_data
from dcnseg.data.image_io import read_mask
from dcnseg.data.pairing.folders import find_splits
from dcnseg.data.pairing.splits import Pairing
from dcnseg.data.synthetic import (
    SCENE_CLASSES,
    generate_caps,
    generate_scene,
    get_scene_seed,
    write_scenes,
)
from dcnseg.scoring.objects import find_objects

HUES = {1: 0.035, 2: 0.44, 3: 0.13}


def test_the_same_seed_gives_the_same_bits() -> None:
    image, labels = generate_scene(3)
    again, labels_again = generate_scene(3)
    other, _ = generate_scene(4)
    assert image.shape == (192, 192, 3)
    assert labels.shape == (192, 192)
    assert image.dtype == labels.dtype == np.uint8
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(labels, labels_again)
    assert (image != other).mean() > 0.5


def test_sizes_down_to_tiny_ones() -> None:
    for size_hw in ((1, 1), (7, 30), (65, 33)):
        image, labels = generate_scene(0, size_hw)
        assert image.shape == (*size_hw, 3)
        assert labels.shape == size_hw


def test_every_class_occurs_and_background_is_most() -> None:
    labels = np.stack([generate_scene(seed)[1] for seed in range(30)])
    background, *objects = (np.bincount(labels.ravel(), minlength=4) / labels.size).tolist()
    assert 0.65 < background < 0.9
    assert len(objects) == 3
    assert min(objects) > 0.03


def test_beads_have_very_different_sizes() -> None:
    areas = [
        area
        for seed in range(30)
        for area in find_objects(generate_scene(seed)[1], (1, 2, 3)).areas
    ]
    radii = np.sqrt(np.array(areas) / np.pi)
    assert np.quantile(radii, 0.9) > 3.5 * np.quantile(radii, 0.1)
    assert len(areas) > 80


def test_only_the_caps_tell_the_class() -> None:
    """The colors of the rim as a whole do not: each bead shows another class on a third of it."""
    by_class: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for seed in range(40):
        image, labels = generate_scene(seed)
        objects = find_objects(labels, (1, 2, 3))
        hue = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
        for number, class_id in enumerate(objects.class_indices, 1):
            inside = objects.numbers == number
            colored = inside & (hue[..., 1] > 120)
            distance = np.abs(hue[..., 0][colored] / 255 - HUES[class_id])
            by_class[class_id].append(float((np.minimum(distance, 1 - distance) < 0.06).mean()))
    for shares in by_class.values():
        assert 0.4 < np.mean(shares) < 0.8
        assert np.quantile(shares, 0.25) < 0.6 < 0.9 < np.quantile(shares, 0.85)


def test_caps_have_the_color_of_the_class() -> None:
    for seed in range(8):
        image, labels = generate_scene(seed, lookalikes=2)
        caps = generate_caps(seed, lookalikes=2)
        assert labels[caps].all()
        assert 0.09 < caps.sum() / (labels > 0).sum() < 0.14
        hue = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)[..., 0][caps] / 255
        distance = np.abs(hue - np.vectorize(HUES.get)(labels[caps]))
        assert (np.minimum(distance, 1 - distance) < 0.06).mean() > 0.97


def test_written_scenes_are_an_ordinary_data_folder(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=3, val=2, test=1, size_hw=(48, 64), seed=1)
    splits = find_splits(tmp_path / "scenes")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [3, 2, 1]
    report = check_data(tmp_path / "scenes", Pairing(splits))
    assert report.class_map == SCENE_CLASSES
    assert report.is_clean
    assert report.sizes == {"64x48": 6}
    assert sum(entry.pixels for entry in report.classes) == 6 * 48 * 64
    labels = generate_scene(get_scene_seed(1, "val", 1), (48, 64))[1]
    np.testing.assert_array_equal(read_mask(splits.val[1].mask), labels)
    contents = {sample.image.read_bytes() for sample in splits.all_samples()}
    assert len(contents) == 6


def test_lookalikes_belong_to_the_background() -> None:
    for seed in range(6):
        image, labels = generate_scene(seed)
        more, same_labels = generate_scene(seed, lookalikes=3)
        np.testing.assert_array_equal(labels, same_labels)
        assert (image[labels == 0] != more[labels == 0]).mean() > 0.05
