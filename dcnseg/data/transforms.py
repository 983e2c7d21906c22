"""Joint augmentation of picture and label map, and normalisation.

The entry point is `build_train_transform`; what it returns is called with a picture uint8 [3, H, W]
and training indices uint8 [H, W], and returns float32 and int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dcnseg.data.class_map import IGNORE_INDEX
from dcnseg.errors import ConfigError


@dataclass(frozen=True)
class _Crop:
    """Rows and columns of the picture, the size they get, and where they lie in the crop."""

    source: tuple[int, int, int, int]  # top, left, height, width
    size_hw: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, top, right, bottom, as torchvision orders them


class RandomScaledCrop(v2.Transform):  # type: ignore[misc]
    """Scale by a random factor, pad to the crop size where needed, crop at a random place.

    The factor is the same for height and width, uniform in `scale_range`. A picture that is smaller
    than the crop lies at a random place in it, on `fill` (label map: 255). Only the part of the
    picture that ends up in the crop is resized. Label maps take the nearest pixel's value.

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
        # Per axis: start and length in the picture, length in the crop, padding before and after.
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
        """Cut out, resize and pad one picture or label map."""
        crop: _Crop = params["crop"]
        part = F.crop(inpt, *crop.source)
        is_labels = isinstance(inpt, tv_tensors.Mask)
        if crop.size_hw != crop.source[2:]:
            part = _resize_nearest(part, crop.size_hw) if is_labels else _resize(part, crop.size_hw)
        if any(crop.padding):
            part = F.pad(part, list(crop.padding), fill=IGNORE_INDEX if is_labels else self.fill)
        return part


class Normalise(v2.Transform):  # type: ignore[misc]
    """Turn uint8 pictures into (x / 255 - mean) / std as float32, and label maps into int64."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean = list(mean)
        self.std = list(std)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Convert one picture or label map; the results are plain tensors."""
        if isinstance(inpt, tv_tensors.Mask):
            return inpt.as_subclass(Tensor).long()
        values = F.to_dtype(inpt.as_subclass(Tensor), torch.float32, scale=True)
        return F.normalize(values, self.mean, self.std, inplace=True).contiguous()


class JointTransform:
    """Hand a picture and its label map, plain tensors, to a torchvision v2 transform."""

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
    colour_jitter: float = 0.0,
    mean: Sequence[float],
    std: Sequence[float],
) -> JointTransform:
    """Random scale, padding, random crop, horizontal flip, colour jitter, normalisation.

    Args:
        crop_hw: Size of every result, in pixels.
        scale_range: Least and greatest factor by which the picture is scaled before the crop.
        flip: Mirror every other picture left to right.
        colour_jitter: Brightness, contrast and saturation change by up to this share, 0..1.
        mean: Per channel (RGB), of pictures in 0..1; also the colour beside a small picture.
        std: As `mean`.

    Raises:
        ConfigError: A value is out of its range.
    """
    if min(crop_hw) < 1:
        raise ConfigError(f"`crop_hw` is {crop_hw}; both must be at least 1.")
    if not 0 < scale_range[0] <= scale_range[1]:
        raise ConfigError(f"`scale_range` is {scale_range}; it must be 0 < least <= greatest.")
    if not 0 <= colour_jitter <= 1:
        raise ConfigError(f"`colour_jitter` is {colour_jitter}; it must be in 0..1.")
    fill = [round(255 * value) for value in mean]
    steps: list[v2.Transform] = [RandomScaledCrop(crop_hw, scale_range, fill)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if colour_jitter:
        steps.append(v2.ColorJitter(colour_jitter, colour_jitter, colour_jitter))
    return JointTransform(v2.Compose([*steps, Normalise(mean, std)]))


def _place_axis(size: int, crop: int, scale: float, place: float) -> tuple[int, ...]:
    """Place the crop on one axis; `place` in [0, 1) says where.

    Returns:
        Start and length in the picture, length in the crop, padding before and after.
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
    return F.resize(image, list(size_hw), interpolation=v2.InterpolationMode.BILINEAR)


def _resize_nearest(labels: Any, size_hw: tuple[int, int]) -> Any:
    # torchvision resizes a Mask by NEAREST, which shifts it by up to half a pixel against the
    # picture; NEAREST_EXACT does not.
    exact = v2.InterpolationMode.NEAREST_EXACT
    resized = F.resize(labels.as_subclass(Tensor)[None], list(size_hw), interpolation=exact)
    return tv_tensors.Mask(resized[0])
