"""Joint augmentation of image and label map, and normalization.

The entry point is `build_train_transform`; what it returns is called with an image uint8 [3, H, W]
and training indices uint8 [H, W], and returns float32 and int64.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Crop:
    """Rows and columns of the image, the size they get, and where they lie in the crop."""

    source: tuple[int, int, int, int]  # top, left, height, width
    size_hw: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, top, right, bottom, as torchvision orders them


class RandomScaledCrop(v2.Transform):  # type: ignore[misc]
    """Scale by a random factor, pad to the crop size where needed, crop at a random place.

    The factor is the same for height and width, uniform in `scale_range`. An image that is smaller
    than the crop lies at a random place in it, on `fill` (label map: 255). Only the part of the
    image that ends up in the crop is resized. Label maps take the nearest pixel's value.

    A crop may hold ignored pixels alone; the loss has to bear that.
    """

    def __init__(
        self, crop_hw: tuple[int, int], scale_range: tuple[float, float], fill: Sequence[int]
    ) -> None:
        super().__init__()
        self.crop_hw = crop_hw
        self.scale_range = scale_range
        self.fill = list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the factor and the place."""
        size_hw = F.get_size(flat_inputs[0])
        low, high = self.scale_range
        scale, *places = torch.rand(3).tolist()
        scale = low + (high - low) * scale
        # Per axis: start and length in the image, length in the crop, padding before and after.
        rows, columns = (
            _place_axis(size, crop, scale, place)
            for size, crop, place in zip(size_hw, self.crop_hw, places, strict=True)
        )
        crop = _Crop(
            (rows[0], columns[0], rows[1], columns[1]),
            (rows[2], columns[2]),
            (columns[3], rows[3], columns[4], rows[4]),
        )
        return {"crop": crop}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut out, resize and pad one image or label map."""
        crop: _Crop = params["crop"]
        part = F.crop(inpt, *crop.source)
        is_labels = isinstance(inpt, tv_tensors.Mask)
        if crop.size_hw != crop.source[2:]:
            part = _resize_nearest(part, crop.size_hw) if is_labels else _resize(part, crop.size_hw)
        if any(crop.padding):
            part = F.pad(part, list(crop.padding), fill=IGNORE_INDEX if is_labels else self.fill)
        return part


class RandomQuarterTurns(v2.Transform):  # type: ignore[misc]
    """Turn by a random multiple of 90 or 180 degrees; no value is interpolated."""

    def __init__(self, degrees: int) -> None:
        super().__init__()
        self.step = degrees // 90

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the number of quarter turns."""
        return {"turns": self.step * int(torch.randint(4 // self.step, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turn one image or label map."""
        return tv_tensors.wrap(torch.rot90(inpt, params["turns"], (-2, -1)), like=inpt)


class RandomTilt(v2.Transform):  # type: ignore[misc]
    """Turn by a random angle up to `degrees` either way, and keep the middle of the result.

    It is given `source_hw` pixels, which cover the result at every angle, so that no corner is
    empty unless the image ends there. Label maps take the nearest pixel's value.
    """

    def __init__(self, crop_hw: tuple[int, int], degrees: float, fill: Sequence[int]) -> None:
        super().__init__()
        self.crop_hw = crop_hw
        self.degrees = degrees
        self.fill = list(fill)

    @property
    def source_hw(self) -> tuple[int, int]:
        """Height and width of the box around the result in its widest position, and a border."""
        height, width = self.crop_hw
        most = math.radians(self.degrees)

        def extent(along: int, across: int) -> int:
            # along * cos + across * sin grows up to the angle of the diagonal.
            angle = min(most, math.atan2(across, along))
            widest = math.ceil(along * math.cos(angle) + across * math.sin(angle))
            # Bilinear interpolation reads a neighbor; an even difference keeps the middle there.
            return widest + 2 + (widest - along) % 2

        return extent(height, width), extent(width, height)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the angle."""
        return {"angle": self.degrees * (2 * float(torch.rand(())) - 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Turn one image or label map and cut out its middle."""
        is_labels = isinstance(inpt, tv_tensors.Mask)
        turned = F.rotate(
            inpt,
            params["angle"],
            interpolation=v2.InterpolationMode.NEAREST if is_labels else _BILINEAR,
            fill=IGNORE_INDEX if is_labels else self.fill,
        )
        return F.center_crop(turned, list(self.crop_hw))


class CustomAugmentation(v2.Transform):  # type: ignore[misc]
    """Call an augmentation that is not dcnseg's own with an image and its label map.

    Whatever generator it draws from (torch, NumPy's or Python's global one), its numbers follow
    from torch's generator alone, which the data set seeds for each item.

    Args:
        augment: Called with a `tv_tensors.Image`, uint8 [3, H, W], and a `tv_tensors.Mask`, uint8
            [H, W] of training indices, 255 where ignored; returns two such tensors of one size.
    """

    def __init__(self, augment: Augmentation) -> None:
        super().__init__()
        self.augment = augment

    def forward(self, *inputs: Any) -> Any:
        """Augment and check what comes back.

        Raises:
            ConfigError: the result is not an image and a label map.
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
    """Module and name of a function, or of an object's class, by which a run remembers it."""
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
            f"the augmentation {name} returned {found:.200} as the {kind}; expected a tensor, "
            f"torch.uint8 [{', '.join(shape)}], of the same height and width as the other."
        )


@contextmanager
def _seeded_globals(seed: int) -> Iterator[None]:
    """Within it, the generators of Python and NumPy begin at `seed`; afterwards they go on."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class Normalize(v2.Transform):  # type: ignore[misc]
    """Turn uint8 images into (x / 255 - mean) / std as float32, and label maps into int64."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean = list(mean)
        self.std = list(std)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Convert one image or label map; the results are plain tensors."""
        if isinstance(inpt, tv_tensors.Mask):
            return inpt.as_subclass(Tensor).long()
        values = F.to_dtype(inpt.as_subclass(Tensor), torch.float32, scale=True)
        return F.normalize(values, self.mean, self.std, inplace=True).contiguous()


class JointTransform:
    """Hand an image and its label map, plain tensors, to a torchvision v2 transform."""

    def __init__(self, transform: v2.Transform) -> None:
        self.transform = transform

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Transform uint8 [3, H, W] and uint8 [H, W] into float32 [3, h, w] and int64 [h, w]."""
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
    """Own augmentation, random scale, crop and rotation, flips, color jitter, blur, normalization.

    A step that is off draws no random numbers, so that runs without it stay what they were.

    Args:
        crop_hw: Size of every result, in pixels.
        scale_range: Least and greatest factor by which the image is scaled before the crop.
        flip: Mirror every other image left to right.
        vertical_flip: Mirror every other image top to bottom.
        rotate: 90 and 180: a random multiple of it, without interpolation; another value: a random
            angle of at most as many degrees either way.
        color_jitter: Brightness, contrast and saturation change by up to this share, 0..1.
        blur: Blur every other image, with a Gaussian whose sigma is up to as many pixels, 0..10.
        augment: Called first, see `CustomAugmentation`.
        mean: Per channel (RGB), of images in 0..1; also the color beside a small image.
        std: As `mean`.

    Raises:
        ConfigError: A value is out of its range.
    """
    if min(crop_hw) < 1:
        raise ConfigError(f"`crop_hw` is {crop_hw}; both must be at least 1.")
    if not 0 < scale_range[0] <= scale_range[1]:
        raise ConfigError(f"`scale_range` is {scale_range}; it must be 0 < least <= greatest.")
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
        # Reflected at the border, which cannot be farther away than the other side.
        radius = min(math.ceil(3 * blur), min(crop_hw) - 1)
        steps.append(v2.RandomApply([v2.GaussianBlur(2 * radius + 1, (blur / 100, blur))]))
    return JointTransform(v2.Compose([*steps, Normalize(mean, std)]))


def _place_axis(size: int, crop: int, scale: float, place: float) -> tuple[int, ...]:
    """Place the crop on one axis; `place` in [0, 1) says where.

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


def _resize(image: Any, size_hw: tuple[int, int]) -> Any:
    return F.resize(image, list(size_hw), interpolation=_BILINEAR)


def _resize_nearest(labels: Any, size_hw: tuple[int, int]) -> Any:
    # torchvision resizes a Mask by NEAREST, which shifts it by up to half a pixel against the
    # image; NEAREST_EXACT does not.
    exact = v2.InterpolationMode.NEAREST_EXACT
    resized = F.resize(labels.as_subclass(Tensor)[None], list(size_hw), interpolation=exact)
    return tv_tensors.Mask(resized[0])
