"""Effective receptive fields by the gradient of the logits; entry point `measure_fields`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dcnseg.inference.predictor import Predictor
from dcnseg.models.offset_ablation import replace_offsets
from dcnseg.scoring.counts import Floats, LabelIndices
from dcnseg.visualize.measures.results import FieldRadius

UInt8Array = npt.NDArray[np.uint8]

WINDOW: Final = 768  # pixels of the network's input around a pixel; bounds the memory
SHARES: Final = (0.5, 0.9)  # of the gradient


@dataclass(frozen=True)
class ClassPixel:
    """A pixel of an image, and the training index of its class."""

    class_index: int
    row: int
    column: int


class PixelSampler:
    """Draws pixels of each class from a stream of label maps, each pixel with the same probability.

    Source: Vitter 1985, "Random sampling with a reservoir"; one reservoir per drawn pixel, so that
    pixels are drawn with replacement.
    """

    def __init__(self, num_classes: int, pixels_per_class: int, *, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._num_seen = np.zeros(num_classes, np.int64)
        self._places = np.full((num_classes, pixels_per_class, 3), -1, np.int64)
        self._num_images = 0

    def add(self, labels: LabelIndices) -> None:
        """Add the training indices of an image, uint8 [H, W]; 255 is ignored."""
        slots = self._places.shape[1]
        counts = np.bincount(labels.ravel(), minlength=256)[: len(self._num_seen)]
        self._num_seen += counts
        for index in np.flatnonzero(counts) if slots else ():
            is_drawn = self._rng.random(slots) * self._num_seen[index] < counts[index]
            if not is_drawn.any():
                continue
            pixels = np.flatnonzero(labels == index)
            drawn = pixels[self._rng.integers(len(pixels), size=int(is_drawn.sum()))]
            rows, columns = np.unravel_index(drawn, labels.shape)
            numbers = np.full(len(drawn), self._num_images)
            self._places[index, is_drawn] = np.stack([numbers, rows, columns], axis=1)
        self._num_images += 1

    def by_image(self) -> dict[int, list[ClassPixel]]:
        """The drawn pixels by the number of their image."""
        found: dict[int, list[ClassPixel]] = {}
        for index, places in enumerate(self._places.tolist()):
            for image, row, column in places:
                if image >= 0:
                    found.setdefault(image, []).append(ClassPixel(index, row, column))
        return dict(sorted(found.items()))


def measure_fields(
    predictor: Predictor,
    sampler: PixelSampler,
    read: Callable[[int], UInt8Array],
    *,
    on_progress: Callable[[int, int], None],
) -> dict[str, FieldRadius]:
    """Measure the effective receptive field of each class, with the offsets and without.

    The field is the gradient of the logit of the pixel's class at the pixel with respect to the
    network's input, summed over the channels in absolute value. It includes the way through the
    layers that predict offsets and modulation. Without offsets, the modulation is kept.

    Args:
        predictor: A predictor whose network has deformable layers.
        sampler: The drawn pixels.
        read: Reads the image with a number, RGB uint8 [H, W, 3].
        on_progress: Called with the number of images that are done and their total.

    Returns:
        The medians over the pixels, by the name of the class; classes without pixels are left out.

    Source: Luo et al. 2016, "Understanding the Effective Receptive Field in Deep CNNs".
    """
    found: dict[int, list[Floats]] = {}
    drawn = sampler.by_image()
    with _frozen_parameters(predictor.model):
        for done, (number, pixels) in enumerate(drawn.items(), 1):
            image = read(number)
            own = _measure_pixels(predictor, image, pixels)
            with replace_offsets(predictor.model, "zeroed"):
                zeroed = _measure_pixels(predictor, image, pixels)
            for pixel, radii in zip(pixels, np.hstack([own, zeroed]), strict=True):
                found.setdefault(pixel.class_index, []).append(radii)
            on_progress(done, len(drawn))
    names = predictor.class_map.names
    return {names[index]: _summarize(np.array(radii)) for index, radii in sorted(found.items())}


def compute_radii(gradient: Floats, center_yx: tuple[float, float], pixel_px: Floats) -> Floats:
    """Compute the radius of the circle around a point that contains each of `SHARES` of a map.

    Args:
        gradient: At least 0, [h, w].
        center_yx: The point, in pixels of the map.
        pixel_px: Height and width of a pixel of the map in the unit of the radius, [2].

    Returns:
        Radii to the center of the outermost pixel, [SHARES]; NaN if the map is zero or not finite.
    """
    total = gradient.sum()
    if not 0 < total < np.inf:
        return np.full(len(SHARES), np.nan)
    rows, columns = (
        (np.arange(size) - center) * scale
        for size, center, scale in zip(gradient.shape, center_yx, pixel_px, strict=True)
    )
    distance = np.hypot(rows[:, None], columns).ravel()
    order = np.argsort(distance, kind="stable")
    contained = np.cumsum(gradient.ravel()[order])
    # Rounding must not skip a pixel that reaches a share exactly.
    reached = np.searchsorted(contained, np.array(SHARES) * contained[-1] * (1 - 1e-12))
    return np.asarray(distance[order[reached]])


def _measure_pixels(
    predictor: Predictor, image: UInt8Array, pixels: Sequence[ClassPixel]
) -> Floats:
    """Measure the radii of each pixel in pixels of the image, [pixels, SHARES]."""
    side = max(1, round(WINDOW / predictor.preprocessing.input_scale))
    corner: tuple[int, ...] | None = None
    found = []
    for pixel in pixels:
        place = pixel.row, pixel.column
        start = tuple(
            min(max(0, at - side // 2), max(0, size - side))
            for at, size in zip(place, image.shape[:2], strict=True)
        )
        if start != corner:  # pixels of the same window share a pass
            corner = start
            window = image[start[0] : start[0] + side, start[1] : start[1] + side]
            network_input = predictor.prepare(window).requires_grad_()
            logits = predictor.model(network_input)[0]  # [K, h, w]
            sizes = list(zip(window.shape[:2], logits.shape[1:], strict=True))
        row, column = (
            min(of_network - 1, int((at - first + 0.5) * of_network / of_image))
            for at, first, (of_image, of_network) in zip(place, start, sizes, strict=True)
        )
        logit = logits[pixel.class_index, row, column]
        (gradient,) = torch.autograd.grad(logit, network_input, retain_graph=True)
        strength = gradient[0].abs().sum(0).double().cpu().numpy()
        pixel_px = np.array([of_image / of_network for of_image, of_network in sizes])
        found.append(compute_radii(strength, (row, column), pixel_px))
    return np.array(found)


def _summarize(radii: Floats) -> FieldRadius:
    """The medians of the radii [pixels, 2 * SHARES] of the pixels that have a gradient."""
    known = radii[np.isfinite(radii).all(1)]
    medians = np.median(known, axis=0) if len(known) else np.full(radii.shape[1], np.nan)
    return FieldRadius(len(known), *medians.tolist())


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of the parameters, which would need more memory."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
