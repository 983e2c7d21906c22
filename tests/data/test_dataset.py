from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader

from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.dataset import SegmentationDataset, decode_mask, load_label_map
from dcnseg.data.image_file import apply_orientation
from dcnseg.data.image_io import write_png
from dcnseg.errors import ConfigError, DataError
from tests.data.helpers import samples_of

CLASSES = ClassMap((ClassInfo(0, "ground", (0, 0, 0)), ClassInfo(5, "tree", (0, 99, 0))))
UInt8Array = npt.NDArray[np.uint8]


def write_pairs(root: Path, masks: list[npt.NDArray[np.generic]]) -> None:
    for index, mask in enumerate(masks):
        photo = np.full((*mask.shape[:2], 3), index, np.uint8)
        write_png(root / "images" / f"{index}.png", photo)
        write_png(root / "masks" / f"{index}.png", mask)


def ids(*values: int) -> UInt8Array:
    return np.array([values], np.uint8)


def noise(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return image + torch.rand(3, 1, 1), labels.long()


def test_a_threshold_applies_to_gray_values_and_to_the_brightest_channel() -> None:
    class_map = ClassMap.binary(255).with_threshold(100)
    assert decode_mask(ids(*range(256)), class_map)[0].tolist() == [[0] * 100 + [1] * 156]
    colors = np.array([[[90, 99, 9], [90, 100, 9]]], np.uint8)
    assert decode_mask(colors, class_map)[0].tolist() == [[0, 1]]


def test_equal_channels_are_ids_unless_all_are_class_colors() -> None:
    gray = np.repeat(ids(5, 0)[..., None], 3, axis=2)
    labels, encoding = decode_mask(gray, CLASSES)
    assert (labels.tolist(), encoding) == ([[1, 0]], "ids")
    labels, encoding = decode_mask(np.zeros((1, 2, 3), np.uint8), CLASSES)
    assert (labels.tolist(), encoding) == ([[0, 0]], "colors")
    uncolored = ClassMap.from_values([0, 5])
    labels, encoding = decode_mask(gray, uncolored)
    assert (labels.tolist(), encoding) == ([[1, 0]], "ids")


def test_wrong_label_maps_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    write_png(path, ids(0, 40, 40))
    with pytest.raises(DataError, match=r"mask\.png: 2 pixels have the value 40; the 2 classes"):
        load_label_map(path, CLASSES)
    write_png(path, np.array([[[9, 8, 7]]], np.uint8))
    with pytest.raises(DataError, match=r"mask\.png: 1 pixel has the color \(9, 8, 7\)"):
        load_label_map(path, CLASSES)
    text = r"mask\.png: is a color mask, but there are no class colors in the mask values"
    with pytest.raises(DataError, match=text):
        load_label_map(path, ClassMap.from_values([0, 1]))


def test_items_without_a_transform(tmp_path: Path) -> None:
    write_pairs(tmp_path, [ids(0, 5, 255), ids(5, 5, 5)])
    for cache in (False, True):
        data = SegmentationDataset(samples_of(tmp_path), CLASSES, cache=cache)
        image, labels = data[1]
        assert image.shape == (3, 1, 3)
        assert image.dtype == labels.dtype == torch.uint8
        assert image.unique().tolist() == [1]
        labels.fill_(0)  # must not reach the cache
        assert data[1][1].tolist() == [[1, 1, 1]]
        assert data[0][1].tolist() == [[0, 1, 255]]
        assert len(data) == 2


def test_input_scale_keeps_classes_pure(tmp_path: Path) -> None:
    mask = np.zeros((9, 14), np.uint8)
    mask[:, 7:] = 5
    write_pairs(tmp_path, [mask])
    image, labels = SegmentationDataset(samples_of(tmp_path), CLASSES, input_scale=0.5)[0]
    assert image.shape == (3, 4, 7)
    assert labels.shape == (4, 7)
    assert labels.unique().tolist() == [0, 1]
    with pytest.raises(ConfigError, match="`input_scale` is 0"):
        SegmentationDataset([], CLASSES, input_scale=0)


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    write_png(tmp_path / "images" / "a.png", np.zeros((4, 6, 3), np.uint8))
    write_png(tmp_path / "masks" / "a.png", np.zeros((6, 4), np.uint8))
    data = SegmentationDataset(samples_of(tmp_path), CLASSES)
    message = r"masks/a\.png: is 4x6 pixels, but its image a\.png is 6x4; .* may be rotated"
    with pytest.raises(DataError, match=message):
        data[0]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_masks_that_fit_the_stored_pixels_are_rotated(tmp_path: Path, orientation: int) -> None:
    stored = np.array([[0, 5, 0, 5], [5, 5, 0, 0]], np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    (tmp_path / "images").mkdir()
    photo = Image.fromarray(np.repeat(stored[..., None] * 50, 3, axis=2))
    photo.save(tmp_path / "images" / "a.png", exif=exif)
    write_png(tmp_path / "masks" / "a.png", stored)
    image, labels = SegmentationDataset(samples_of(tmp_path), CLASSES)[0]
    assert torch.equal(labels > 0, image[0] > 0)
    assert labels.shape == (4, 2)
    upright = apply_orientation(stored, orientation)
    write_png(tmp_path / "masks" / "a.png", upright)
    assert torch.equal(SegmentationDataset(samples_of(tmp_path), CLASSES)[0][1], labels)


def test_random_numbers_depend_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    write_pairs(tmp_path, [ids(0, 0)] * 4)
    samples = samples_of(tmp_path)
    data = SegmentationDataset(samples, CLASSES, noise, seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [data[index][0] for index in range(4)]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's numbers go on undisturbed
    torch.manual_seed(99)
    again = [data[index][0] for index in reversed(range(4))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({float(image.sum()) for image in first}) == 4
    other = SegmentationDataset(samples, CLASSES, noise, seed=4)
    assert not torch.equal(other[0][0], first[0])
    data.set_epoch(1)
    assert not torch.equal(data[0][0], first[0])
    data.set_epoch(0)
    assert torch.equal(data[0][0], first[0])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_workers_see_the_epoch_and_change_nothing(tmp_path: Path) -> None:
    write_pairs(tmp_path, [ids(0, 0)] * 4)
    data = SegmentationDataset(samples_of(tmp_path), CLASSES, noise)
    loader = DataLoader(data, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        data.set_epoch(epoch)
        expected = torch.stack([data[index][0] for index in range(4)])
        assert torch.equal(torch.cat([images for images, _ in loader]), expected)
