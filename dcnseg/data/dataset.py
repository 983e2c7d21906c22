"""Samples -> label maps and tensors.

The entry points are `load_label_map` and `SegmentationDataset`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dcnseg.data.class_map import ClassMap, UnknownLabelsError
from dcnseg.data.image_file import apply_orientation
from dcnseg.data.image_io import is_gray, read_image, read_mask, read_orientation
from dcnseg.data.polygons.drawings import is_polygon_file, load_polygons
from dcnseg.data.sample import Sample
from dcnseg.errors import ConfigError, DataError

UInt8Array = npt.NDArray[np.uint8]
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def load_label_map(source: Sample | Path, class_map: ClassMap) -> UInt8Array:
    """Read a mask as training indices 0..K-1, 255 where ignored, uint8 [H, W].

    Color masks are matched with the colors of the classes. If a mask with three equal channels
    (k, k, k) has a gray of no class, k is the id.

    Raises:
        DataError: The file is broken or has a value of no class; gives the file, the values and
            their pixel counts.
    """
    if isinstance(source, Sample) and is_polygon_file(source.mask):
        return load_polygons(source, class_map)
    path = source.mask if isinstance(source, Sample) else source
    try:
        return decode_mask(read_mask(path), class_map)[0]
    except (UnknownLabelsError, ConfigError) as error:
        raise DataError(f"{path}: {error}") from error


def decode_mask(mask: npt.NDArray[Any], class_map: ClassMap) -> tuple[UInt8Array, str]:
    """Return the training indices for a result of `read_mask`, and "ids" or "colors".

    Raises:
        UnknownLabelsError: A value or color belongs to no class.
        ConfigError: The mask is in colors, and the class list has none or repeats one.
    """
    if mask.ndim == 2:
        return class_map.encode_ids(mask), "ids"
    if class_map.threshold:
        return class_map.encode_ids(mask.max(axis=2)), "ids"
    has_ids = is_gray(mask)
    if not class_map.has_colors:
        if has_ids:
            return class_map.encode_ids(mask[..., 0]), "ids"
        raise ConfigError(
            f"is a color mask, but there are no class colors in {class_map.source}. Add "
            '"color": [red, green, blue] to each class in classes.json.'
        )
    try:
        return class_map.encode_colors(mask), "colors"
    except UnknownLabelsError:
        if not has_ids:
            raise
        return class_map.encode_ids(mask[..., 0]), "ids"


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples as tensors: image and label map with the same transform.

    Without a transform an item is (uint8 [3, H, W], uint8 [H, W] of training indices); with one it
    is its result, usually (float32 [3, h, w], int64 [h, w]). The random numbers of a transform
    depend on (seed, epoch, index) only, not on the number of workers or the order.

    Args:
        samples: The files of the items.
        class_map: Converts masks to training indices.
        transform: Called with the two uint8 tensors; draws from torch's global generator.
        input_scale: Factor by which both are resized before the transform.
        seed: Seed of the transform's random numbers.
        cache: Decode all samples now and keep them in memory (4*H*W bytes each after resizing).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        class_map: ClassMap,
        transform: Transform | None = None,
        *,
        input_scale: float = 1.0,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        if not input_scale > 0:
            raise ConfigError(f"`input_scale` is {input_scale}; it must be greater than 0.")
        self.samples = tuple(samples)
        self.class_map = class_map
        self.transform = transform
        self.input_scale = input_scale
        self.seed = seed
        # In shared memory, so that persistent workers see `set_epoch`.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._cache: list[tuple[UInt8Array, UInt8Array]] = []
        if cache:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self._cache = list(pool.map(self._load, self.samples))

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the random numbers; call it before each epoch."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self._cache[index] if self._cache else self._load(self.samples[index])
        image_tensor = torch.from_numpy(image).permute(2, 0, 1)  # [3, H, W], channels last inside
        label_tensor = torch.from_numpy(labels)
        if self.transform is None:
            return image_tensor.clone(), label_tensor.clone()  # do not expose the cached arrays
        state = np.random.SeedSequence((self.seed, int(self._epoch), index % len(self)))
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also reseed the generators of accelerators.
            torch.default_generator.manual_seed(int(state.generate_state(1, np.uint64)[0]))
            return self.transform(image_tensor, label_tensor)

    def _load(self, sample: Sample) -> tuple[UInt8Array, UInt8Array]:
        image, labels = load_pair(sample, self.class_map)
        if self.input_scale == 1:
            return image, labels
        size_hw = scaled_size_hw(labels.shape, self.input_scale)
        # cv2's thread pool may hang in a forked worker. Bilinear with antialiasing, as in
        # `Predictor`, so that the blur is the same in training and prediction.
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # [1, 3, H, W]
        pixels = F.interpolate(pixels, size=size_hw, mode="bilinear", antialias=True)
        indices = torch.from_numpy(labels)[None, None]
        indices = F.interpolate(indices, size=size_hw, mode="nearest-exact")
        return pixels[0].permute(1, 2, 0).contiguous().numpy(), indices[0, 0].numpy()


def load_pair(sample: Sample, class_map: ClassMap) -> tuple[UInt8Array, UInt8Array]:
    """Read an image, RGB uint8 [H, W, 3], and its training indices, uint8 [H, W].

    If a mask fits the image only as stored, before EXIF rotation, it is rotated with the image.

    Raises:
        DataError: A file is broken, or the sizes differ; the message names the file.
    """
    image, labels = read_image(sample.image), load_label_map(sample, class_map)
    if image.shape[:2] == labels.shape:
        return image, labels
    if image.shape[1::-1] == labels.shape:
        labels = apply_orientation(labels, side_turn(sample))
    if image.shape[:2] != labels.shape:
        raise DataError(size_mismatch(sample, image.shape[:2], labels.shape))
    return image, labels


def side_turn(sample: Sample) -> int:
    """Return the EXIF orientation that must be applied to a mask stored on its side; 1: none.

    Raises:
        DataError: A file cannot be read.
    """
    orientation = read_orientation(sample.image)
    is_upright = orientation < 5 or is_polygon_file(sample.mask)
    return 1 if is_upright or read_orientation(sample.mask) != 1 else orientation


def scaled_size_hw(size_hw: Sequence[int], input_scale: float) -> tuple[int, int]:
    """Return the size after resizing by `input_scale`, rounded, at least 1."""
    return max(1, round(size_hw[0] * input_scale)), max(1, round(size_hw[1] * input_scale))


def size_mismatch(sample: Sample, image_hw: Sequence[int], mask_hw: Sequence[int]) -> str:
    """Return the message for a mask whose size differs from its image, both as displayed."""
    hint = ""
    if tuple(image_hw) == tuple(mask_hw)[::-1]:
        hint = " One of them may be rotated (EXIF rotation is applied to both)."
    return (
        f"{sample.mask}: is {mask_hw[1]}x{mask_hw[0]} pixels, but its image {sample.image.name} is "
        f"{image_hw[1]}x{image_hw[0]}; they must have the same size.{hint}"
    )
