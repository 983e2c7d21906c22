"""Joint augmentation of image and label map, and normalization.

The entry point is `build_train_transform`; its result is called with an image uint8 [3, H, W] and
training indices uint8 [H, W], and returns float32 and int64.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dcnseg.config import MAX_BLUR, MAX_ROTATION
from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.errors import ConfigError

_BILINEAR = v2.InterpolationMode.BILINEAR

Augmentation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class RandomScaledCrop(v2.Transform):  # type: ignore[misc]
    """Scale by a random factor, pad to the crop size if needed, crop at a random position.

    The factor is the same for height and width, uniform in `scale_range`. An image smaller than the
    crop gets a random position in it and is padded with `fill` (label map: 255). Only the part of
    the image in the crop is resized. Label maps use nearest-neighbor interpolation.

    A crop may consist of ignored pixels only; the loss must support that.
    """

    def __init__(
        self, crop_hw: tuple[int, int], scale_range: tuple[float, float], fill: Sequence[int]
    ) -> None:
        super().__init__()
        self.crop_hw = crop_hw
        self.scale_range = scale_range
        self.fill = list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the factor and the position."""
        size_hw = F.get_size(flat_inputs[0])
        low, high = self.scale_range
        scale, *places = torch.rand(3).tolist()
        scale = low + (high - low) * scale
        rows, columns = (
            _place_axis(size, crop, scale, place)
            for size, crop, place in zip(size_hw, self.crop_hw, places, strict=True)
        )
        return {
            "source": [rows[0], columns[0], rows[1], columns[1]],  # top, left, height, width
            "size_hw": [rows[2], columns[2]],  # after resizing
            "padding": [columns[3], rows[3], columns[4], rows[4]],  # left, top, right, bottom
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop, resize and pad an image or label map."""
        part = F.crop(inpt, *params["source"])
        is_labels = isinstance(inpt, tv_tensors.Mask)
        if params["size_hw"] != params["source"][2:]:
            part = _resize(part, params["size_hw"])
        if any(params["padding"]):
            part = F.pad(part, params["padding"], fill=IGNORE_INDEX if is_labels else self.fill)
        return part


class RandomQuarterTurns(v2.Transform):  # type: ignore[misc]
    """Rotate by a random multiple of 90 or 180 degrees, without interpolation."""

    def __init__(self, degrees: int) -> None:
        super().__init__()
        self.step = degrees // 90

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the number of quarter turns."""
        return {"turns": self.step * int(torch.randint(4 // self.step, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Rotate an image or label map."""
        return tv_tensors.wrap(torch.rot90(inpt, params["turns"], (-2, -1)), like=inpt)


class RandomTilt(v2.Transform):  # type: ignore[misc]
    """Rotate by a random angle of at most `degrees` in both directions, and crop the center.

    The input has `source_hw` pixels, which cover the result at every angle, so that corners are
    empty only outside the image. Label maps use nearest-neighbor interpolation.
    """

    def __init__(self, crop_hw: tuple[int, int], degrees: float, fill: Sequence[int]) -> None:
        super().__init__()
        self.crop_hw = crop_hw
        self.degrees = degrees
        self.fill = list(fill)

    @property
    def source_hw(self) -> tuple[int, int]:
        """Height and width of the largest bounding box of the rotated result, plus a border."""
        height, width = self.crop_hw
        most = math.radians(self.degrees)

        def extent(along: int, across: int) -> int:
            # along * cos + across * sin grows up to the angle of the diagonal.
            angle = min(most, math.atan2(across, along))
            widest = math.ceil(along * math.cos(angle) + across * math.sin(angle))
            # Bilinear interpolation reads a neighbor; an even difference keeps the center.
            return widest + 2 + (widest - along) % 2

        return extent(height, width), extent(width, height)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the angle."""
        return {"angle": self.degrees * (2 * float(torch.rand(())) - 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Rotate an image or label map and crop its center."""
        is_labels = isinstance(inpt, tv_tensors.Mask)
        turned = F.rotate(
            inpt,
            params["angle"],
            interpolation=v2.InterpolationMode.NEAREST if is_labels else _BILINEAR,
            fill=IGNORE_INDEX if is_labels else self.fill,
        )
        return F.center_crop(turned, list(self.crop_hw))


class CustomAugmentation(v2.Transform):  # type: ignore[misc]
    """Call a user-defined augmentation with an image and its label map.

    The global generators of torch, NumPy and Python are seeded from torch's generator, which the
    data set seeds for each item.

    Args:
        augment: Called with a `tv_tensors.Image`, uint8 [3, H, W], and a `tv_tensors.Mask`, uint8
            [H, W] of training indices, 255 where ignored; returns two such tensors of equal size.
    """

    def __init__(self, augment: Augmentation) -> None:
        super().__init__()
        self.augment = augment

    def forward(self, *inputs: Any) -> Any:
        """Augment and check the result.

        Raises:
            ConfigError: The result is not an image and a label map.
        """
        with _seeded_globals(int(torch.randint(2**32, ()))):
            result = self.augment(*inputs)
        name = name_of(self.augment)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise ConfigError(
                f"the augmentation {name} returned {type(result).__name__}; expected the image "
                "and the label map."
            )
        for kind, value, shape in zip(("image", "label map"), result, ("3HW", "HW"), strict=True):
            _check_augmented(name, kind, value, shape, result[0])
        image, labels = result
        return tv_tensors.Image(image), tv_tensors.Mask(labels)


def name_of(augment: Callable[..., Any]) -> str:
    """Return module and name of a function, or of an object's class, as a run records it."""
    named = augment if hasattr(augment, "__qualname__") else type(augment)
    return f"{named.__module__}.{named.__qualname__}"


def _check_augmented(name: str, kind: str, value: Any, shape: str, image: Any) -> None:
    is_fine = (
        isinstance(value, Tensor)
        and value.dtype == torch.uint8
        and value.ndim == len(shape)
        and (shape == "HW" or value.shape[0] == 3)
        and value.numel() > 0
        and value.shape[-2:] == image.shape[-2:]
    )
    if not is_fine:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ConfigError(
            f"the augmentation {name} returned {found:.200} as the {kind}; expected a torch.uint8 "
            f"tensor [{', '.join(shape)}]; the image and the label map must have the same height "
            "and width."
        )


@contextmanager
def _seeded_globals(seed: int) -> Iterator[None]:
    """Seed the generators of Python and NumPy temporarily, and restore their state."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class Normalize(v2.Transform):  # type: ignore[misc]
    """Convert uint8 images to (x / 255 - mean) / std as float32, and label maps to int64."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean = list(mean)
        self.std = list(std)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Convert an image or label map to a plain tensor."""
        if isinstance(inpt, tv_tensors.Mask):
            return inpt.as_subclass(Tensor).long()
        values = F.to_dtype(inpt.as_subclass(Tensor), torch.float32, scale=True)
        return F.normalize(values, self.mean, self.std, inplace=True).contiguous()


class JointTransform:
    """Apply a torchvision v2 transform to an image and its label map, plain tensors."""

    def __init__(self, transform: v2.Transform) -> None:
        self.transform = transform

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Transform uint8 [3, H, W] and uint8 [H, W] to float32 [3, h, w] and int64 [h, w]."""
        result: tuple[Tensor, Tensor] = self.transform(
            tv_tensors.Image(image), tv_tensors.Mask(labels)
        )
        return result


def build_train_transform(
    *,
    crop_hw: tuple[int, int],
    scale_range: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
    vertical_flip: bool = False,
    rotate: float = 0.0,
    color_jitter: float = 0.0,
    blur: float = 0.0,
    augment: Augmentation | None = None,
    mean: Sequence[float],
    std: Sequence[float],
) -> JointTransform:
    """Build user augmentation, scale, crop, rotation, flips, color jitter, blur, normalization.

    A disabled step draws no random numbers, so that results without it do not change.

    Args:
        crop_hw: Height and width of every result, in pixels.
        scale_range: Minimum and maximum factor by which the image is scaled before the crop.
        flip: Mirror left to right with probability 0.5.
        vertical_flip: Mirror top to bottom with probability 0.5.
        rotate: 90 and 180: random multiples, without interpolation; another value: a random angle
            of at most that many degrees in both directions.
        color_jitter: Maximum relative change of brightness, contrast and saturation, 0..1.
        blur: Maximum sigma in pixels of a Gaussian blur with probability 0.5, 0..10.
        augment: Called first, see `CustomAugmentation`.
        mean: Per channel (RGB), of images in 0..1; also the color of padding.
        std: Like `mean`.

    Raises:
        ConfigError: A value is out of range.
    """
    if min(crop_hw) < 1:
        raise ConfigError(f"`crop_hw` is {crop_hw}; both must be at least 1.")
    if not 0 < scale_range[0] <= scale_range[1]:
        raise ConfigError(f"`scale_range` is {scale_range}; expected 0 < minimum <= maximum.")
    if not 0 <= color_jitter <= 1:
        raise ConfigError(f"`color_jitter` is {color_jitter}; it must be in 0..1.")
    if not 0 <= rotate <= MAX_ROTATION:
        raise ConfigError(f"`rotate` is {rotate}; it must be in 0..{MAX_ROTATION} degrees.")
    if not 0 <= blur <= MAX_BLUR:
        raise ConfigError(f"`blur` is {blur}; it must be in 0..{MAX_BLUR} pixels.")
    fill = [round(255 * value) for value in mean]
    steps: list[v2.Transform] = [] if augment is None else [CustomAugmentation(augment)]
    if rotate in (90, 180):
        steps.append(RandomQuarterTurns(round(rotate)))
    tilt = RandomTilt(crop_hw, rotate, fill) if rotate % 90 else None
    steps.append(RandomScaledCrop(tilt.source_hw if tilt else crop_hw, scale_range, fill))
    if tilt:
        steps.append(tilt)
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if vertical_flip:
        steps.append(v2.RandomVerticalFlip())
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    if blur:
        # Reflection padding must be smaller than the image.
        radius = min(math.ceil(3 * blur), min(crop_hw) - 1)
        steps.append(v2.RandomApply([v2.GaussianBlur(2 * radius + 1, (blur / 100, blur))]))
    return JointTransform(v2.Compose([*steps, Normalize(mean, std)]))


def _place_axis(size: int, crop: int, scale: float, place: float) -> tuple[int, ...]:
    """Position the crop on one axis; `place` in [0, 1) is the relative position.

    Returns:
        Start and length in the image, length in the crop, padding before and after.
    """
    scaled = max(1, round(size * scale))
    if scaled <= crop:
        before = int(place * (crop - scaled + 1))
        return 0, size, scaled, before, crop - scaled - before
    first = int(place * (scaled - crop + 1))
    start = min(round(first * size / scaled), size - 1)
    end = max(start + 1, min(size, round((first + crop) * size / scaled)))
    return start, end - start, crop, 0, 0


def _resize(inpt: Any, size_hw: list[int]) -> Any:
    if not isinstance(inpt, tv_tensors.Mask):
        return F.resize(inpt, size_hw, interpolation=_BILINEAR)
    # torchvision resizes a Mask with NEAREST, which shifts it by up to half a pixel relative to the
    # image; NEAREST_EXACT does not.
    exact = v2.InterpolationMode.NEAREST_EXACT
    return tv_tensors.Mask(
        F.resize(inpt.as_subclass(Tensor)[None], size_hw, interpolation=exact)[0]
    )
