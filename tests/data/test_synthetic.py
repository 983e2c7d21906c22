from __future__ import annotations

from pathlib import Path

import numpy as np

from dcnseg.data.check.report import check_data
from dcnseg.data.pairing.folders import find_splits
from dcnseg.data.pairing.splits import Pairing
from dcnseg.data.synthetic import SCENE_CLASSES, generate_scene, write_scenes


def test_the_same_seed_gives_the_same_bits() -> None:
    image, labels = generate_scene(3)
    again, labels_again = generate_scene(3)
    other, _ = generate_scene(4)
    assert image.shape == (128, 160, 3)
    assert labels.shape == (128, 160)
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
    background, *objects = (np.bincount(labels.ravel(), minlength=5) / labels.size).tolist()
    assert 0.6 < background < 0.9
    assert len(objects) == 4
    assert min(objects) > 0.02


def test_textures_tell_objects_from_clutter() -> None:
    """Within objects neighboring pixels differ more than in the background, clutter included."""
    contrast: list[list[float]] = [[], []]
    for seed in range(10):
        image, labels = generate_scene(seed)
        step = np.abs(np.diff(image.astype(float).mean(axis=2), axis=1))
        is_inner = labels[:, 1:] == labels[:, :-1]
        for is_object in (False, True):
            where = is_inner & ((labels[:, 1:] > 0) == is_object)
            contrast[is_object].append(float(step[where].mean()))
    assert min(contrast[True]) > 1.5 * float(np.mean(contrast[False]))


def test_written_scenes_are_an_ordinary_data_folder(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=3, val=2, test=1, size_hw=(48, 64), seed=1)
    splits = find_splits(tmp_path / "scenes")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [3, 2, 1]
    report = check_data(tmp_path / "scenes", Pairing(splits))
    assert report.class_map == SCENE_CLASSES
    assert report.is_clean
    assert report.sizes == {"64x48": 6}
    assert sum(entry.pixels for entry in report.classes) == 6 * 48 * 64
    contents = {sample.image.read_bytes() for sample in splits.all_samples()}
    assert len(contents) == 6
