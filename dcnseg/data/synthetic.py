"""Generates scenes of striped beads, for the demo, `dcnseg compare` and the tests.

The entry points are `generate_scene`, `generate_caps` and `write_scenes`. The rim of a bead has two
caps in the color of its class, at the two ends that its stripes face. The rest of the rim has the
color of a random class, and rings in the same colors lie around the beads. To classify a pixel
inside a bead, a network must look across the stripes as far as the rim: in a direction that the
stripes tell, and over a distance that differs from bead to bead by a factor of six. No fixed
sampling grid suits all of them; a deformable convolution can learn to look there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.image_io import write_jpeg, write_png

SCENE_CLASSES: Final = ClassMap(
    (
        ClassInfo(0, "background", (40, 44, 52)),
        ClassInfo(1, "coral", (230, 97, 60)),
        ClassInfo(2, "jade", (46, 178, 133)),
        ClassInfo(3, "amber", (246, 196, 66)),
    ),
    source="the generated scenes",
)
SCENE_SIZE: Final = (192, 192)  # height and width in pixels

_HUES: Final = {1: 0.035, 2: 0.44, 3: 0.13}  # of each class, 0..1
_HUE_SPREAD: Final = 0.02
_RADIUS: Final = (0.052, 0.33)  # of the beads, as a fraction of the shorter side
_RING_RADIUS: Final = (0.026, 0.085)
_MAX_BEADS: Final = 4
_MAX_RINGS: Final = 6
_MAX_ATTEMPTS: Final = 40  # to place a bead or a ring
_GAP: Final = 1.08  # distance of two objects in units of the sum of their radii
_CAP_HALF_ANGLE: Final = np.deg2rad(36)

_SPLITS: Final = ("train", "val", "test")

FloatArray = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Circle:
    """A circle around an object, in pixels."""

    y: float
    x: float
    radius: float

    def is_apart_from(self, other: _Circle) -> bool:
        """Whether the gap between the circles is wide enough."""
        distance = np.hypot(self.y - other.y, self.x - other.x)
        return bool(distance > _GAP * (self.radius + other.radius) + 2)


@dataclass
class _Canvas:
    """What is painted: the image in 0..1 [H, W, 3], class ids [H, W], and the caps [H, W]."""

    image: FloatArray
    labels: UInt8Array
    caps: BoolArray


@dataclass(frozen=True)
class _Outline:
    """A bead in its own coordinates, in units of its radius: the stripes run along v."""

    window: tuple[slice, slice]
    u: FloatArray  # [h, w]
    inside: FloatArray  # [h, w], distance to the edge, positive inside
    angle: FloatArray  # [h, w], from the u axis, 0 at both caps, at most pi / 2


def generate_scene(
    seed: int | tuple[int, ...], size_hw: tuple[int, int] = SCENE_SIZE, *, lookalikes: int = 0
) -> tuple[UInt8Array, UInt8Array]:
    """Return an image, RGB uint8 [H, W, 3], and its class ids of SCENE_CLASSES, uint8 [H, W].

    Lookalikes are beads with circles instead of stripes, which belong to the background; there are
    up to `lookalikes` of them. The same arguments give the same bits.
    """
    canvas = _draw(seed, size_hw, lookalikes)
    return (canvas.image.clip(0, 1) * 255 + 0.5).astype(np.uint8), canvas.labels


def generate_caps(
    seed: int | tuple[int, ...], size_hw: tuple[int, int] = SCENE_SIZE, *, lookalikes: int = 0
) -> BoolArray:
    """Return the caps of the beads in the scene of the same arguments, bool [H, W].

    They are the only places that show the class of a bead. Lookalikes have none.
    """
    return _draw(seed, size_hw, lookalikes).caps


def get_scene_seed(seed: int, split: str, index: int) -> tuple[int, int, int]:
    """Return the seed of a scene that `write_scenes` writes."""
    return seed, _SPLITS.index(split), index


def write_scenes(
    root: Path,
    *,
    train: int,
    val: int,
    test: int = 0,
    size_hw: tuple[int, int] = SCENE_SIZE,
    seed: int = 0,
    lookalikes: int = 0,
) -> None:
    """Write `root/{train,val,test}/{images,masks}` and `root/classes.json`; all scenes differ."""
    for split, count in zip(_SPLITS, (train, val, test), strict=True):
        for index in range(count):
            scene_seed = get_scene_seed(seed, split, index)
            image, labels = generate_scene(scene_seed, size_hw, lookalikes=lookalikes)
            name = f"scene_{index:04d}"
            write_jpeg(root / split / "images" / f"{name}.jpg", image, quality=95)
            write_png(root / split / "masks" / f"{name}.png", labels, SCENE_CLASSES.palette())
    text = json.dumps(SCENE_CLASSES.to_dict(), indent=1)
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(text + "\n", encoding="utf-8")


def _draw(seed: int | tuple[int, ...], size_hw: tuple[int, int], lookalikes: int) -> _Canvas:
    rng = np.random.default_rng(seed)
    image = _background(rng, size_hw)
    canvas = _Canvas(image, np.zeros(size_hw, np.uint8), np.zeros(size_hw, np.bool_))
    circles: list[_Circle] = []
    for circle in _place(rng, circles, size_hw, _RADIUS, int(rng.integers(3, _MAX_BEADS + 1))):
        _paint_bead(rng, canvas, circle)
    for circle in _place(rng, circles, size_hw, _RADIUS, lookalikes):
        _paint_bead(rng, canvas, circle, is_lookalike=True)
    for circle in _place(rng, circles, size_hw, _RING_RADIUS, _MAX_RINGS):
        _paint_ring(rng, image, circle)
    image = cv2.GaussianBlur(image, (3, 3), 0.5).astype(np.float32, copy=False)
    image *= rng.uniform(0.85, 1.1)
    image += rng.normal(0, 0.025, image.shape).astype(np.float32)
    canvas.image = image
    return canvas


def _background(rng: np.random.Generator, size_hw: tuple[int, int]) -> FloatArray:
    """Return a noisy gradient between two dull colors."""
    height, width = size_hw
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5) + 0.5
    first, second = (
        _color(rng.random(), rng.uniform(0.1, 0.3), rng.uniform(0.3, 0.6)) for _ in "ab"
    )
    image = first + (second - first) * ramp.clip(0, 1)[..., None]
    for cells, strength in ((4, 0.07), (12, 0.04), (40, 0.03)):
        grid = (cells, cells * width // height + 1)
        gray = rng.normal(0, strength, grid)[..., None]
        coarse = (gray + rng.normal(0, 0.3 * strength, (*grid, 3))).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(image, np.float32)


def _place(
    rng: np.random.Generator,
    circles: list[_Circle],
    size_hw: tuple[int, int],
    radius_range: tuple[float, float],
    count: int,
) -> list[_Circle]:
    """Draw up to `count` circles apart from `circles`, and add them; radii are log-uniform."""
    low, high = np.log(np.asarray(radius_range) * min(size_hw))
    placed: list[_Circle] = []
    for _ in range(_MAX_ATTEMPTS):
        if len(placed) == count:
            break
        radius = float(np.exp(rng.uniform(low, high)))
        # Up to 0.4 radii of an object may be outside the image.
        y, x = (rng.uniform(0.6 * radius, max(0.6 * radius, n - 0.6 * radius)) for n in size_hw)
        circle = _Circle(float(y), float(x), radius)
        if all(circle.is_apart_from(other) for other in circles):
            circles.append(circle)
            placed.append(circle)
    return placed


def _paint_bead(
    rng: np.random.Generator, canvas: _Canvas, circle: _Circle, *, is_lookalike: bool = False
) -> None:
    """Paint a bead with its shadow, and label it with the class of its caps."""
    class_id, rest_id = rng.integers(1, SCENE_CLASSES.num_classes, 2).tolist()
    height, width = canvas.labels.shape
    bead = _outline(rng, circle, (height, width))
    pitch = max(rng.uniform(0.3, 0.4), 3 / circle.radius)  # three pixels can still be seen
    across = bead.inside if is_lookalike else bead.u
    stripes = _soft_step(2 * np.sin(2 * np.pi * (across / pitch + rng.random())))
    hue, saturation = rng.random(), rng.uniform(0.05, 0.2)
    dark, light = _color(hue, saturation, rng.uniform(0.2, 0.3)), _color(hue, 0.5 * saturation, 0.8)
    colors = dark + (light - dark) * stripes[..., None]

    edge_px = bead.inside * circle.radius
    rim = _soft_step(max(2.5, 0.15 * circle.radius) - edge_px)[..., None]
    cap = _soft_step((_CAP_HALF_ANGLE - bead.angle) * circle.radius)[..., None]
    class_color, rest_color = (_class_color(rng, id_) for id_ in (class_id, rest_id))
    colors += rim * (rest_color + cap * (class_color - rest_color) - colors)
    # Darker toward the edge, for a rounded look.
    colors *= (0.78 + 0.3 * (bead.inside / 0.35).clip(0, 1))[..., None]

    patch = canvas.image[bead.window]
    patch *= (1 - 0.45 * _shadow(edge_px > 0, 0.1 * circle.radius))[..., None]
    patch += _soft_step(edge_px)[..., None] * (colors - patch)
    if not is_lookalike:
        canvas.labels[bead.window][edge_px > 0] = class_id
        canvas.caps[bead.window] |= (edge_px > 0) & ((rim * cap)[..., 0] > 0.5)


def _outline(rng: np.random.Generator, circle: _Circle, size_hw: tuple[int, int]) -> _Outline:
    """Draw a bead's rotation, shear, bend and outline."""
    reach = 1.35 * circle.radius
    window = tuple(
        slice(max(0, int(center - reach)), min(size, int(center + reach) + 1))
        for center, size in zip((circle.y, circle.x), size_hw, strict=True)
    )
    y, x = np.mgrid[window].astype(np.float32)
    y, x = (y - circle.y) / circle.radius, (x - circle.x) / circle.radius
    turn, shear = rng.uniform(0, 2 * np.pi), rng.uniform(-0.2, 0.2)
    u = np.cos(turn) * x + np.sin(turn) * y
    v = -np.sin(turn) * x + np.cos(turn) * y + shear * u
    bend, phase = rng.uniform(-0.3, 0.3), rng.uniform(0, 2 * np.pi)
    u = u + bend * (v * v - 0.3) + 0.04 * np.sin(3 * v + phase)
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    edge = 0.92 + rng.uniform(0, 0.07) * np.cos(3 * angle + phase)
    edge += rng.uniform(-0.06, 0.06) * np.cos(2 * angle)
    return _Outline(
        cast(tuple[slice, slice], window),
        u.astype(np.float32),
        (edge - radius).astype(np.float32),
        np.minimum(np.abs(angle), np.pi - np.abs(angle)).astype(np.float32),
    )


def _paint_ring(rng: np.random.Generator, image: FloatArray, circle: _Circle) -> None:
    """Paint a ring in the color of some class onto the background."""
    y, x = np.ogrid[: image.shape[0], : image.shape[1]]
    distance_px = np.abs(np.hypot(y - circle.y, x - circle.x) - 0.85 * circle.radius)
    alpha = 0.9 * _soft_step(max(1.5, 0.15 * circle.radius) - distance_px)[..., None]
    image += alpha * (_class_color(rng, int(rng.integers(1, SCENE_CLASSES.num_classes))) - image)


def _shadow(shape: npt.NDArray[np.bool_], depth_px: float) -> FloatArray:
    """Return the shape, blurred and shifted down and to the right."""
    shift = max(1, round(depth_px))
    moved = np.zeros(shape.shape, np.float32)
    moved[shift:, shift:] = shape[:-shift, :-shift]
    return cast(FloatArray, cv2.GaussianBlur(moved, (0, 0), max(depth_px, 0.5)))


def _soft_step(distance_px: npt.NDArray[np.floating]) -> FloatArray:
    """Map negative distances to 0 and positive ones to 1, with a ramp of one pixel."""
    return (distance_px + 0.5).clip(0, 1).astype(np.float32)


def _class_color(rng: np.random.Generator, class_id: int) -> FloatArray:
    hue = _HUES[class_id] + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD)
    return _color(hue, rng.uniform(0.7, 0.85), rng.uniform(0.85, 1.0))


def _color(hue: float, saturation: float, value: float) -> FloatArray:
    """HSV in 0..1 (the hue wraps around) -> RGB float32 [3] in 0..1."""
    sextants = (hue * 6 + np.array([5.0, 3.0, 1.0])) % 6
    rgb = value - value * saturation * np.clip(np.minimum(sextants, 4 - sextants), 0, 1)
    return rgb.astype(np.float32)
