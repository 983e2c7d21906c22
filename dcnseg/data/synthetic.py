"""Generates scenes of bent, textured shapes on clutter, for the demo and the tests.

The entry points are `generate_scene` and `write_scenes`. The classes differ in texture and shape.
Color alone does not separate them, since clutter without texture has the same colors. Objects are
scaled, rotated, sheared and bent, the variation that deformable convolutions adapt to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
        ClassInfo(1, "snake", (230, 97, 60)),  # a winding band with stripes across
        ClassInfo(2, "leaf", (96, 190, 88)),  # a bent leaf with a checker
        ClassInfo(3, "ladybird", (84, 130, 240)),  # an ellipse with dots
        ClassInfo(4, "star", (242, 200, 70)),  # five arms, rings around the center
    ),
    source="the generated scenes",
)
_HUES: Final = {1: 0.01, 2: 0.34, 3: 0.60, 4: 0.14}  # center of each class's colors, 0..1
_MAX_ATTEMPTS: Final = 10  # to paint 3 to 5 objects
_MAX_OVERLAP: Final = 0.2  # fraction of an object's pixels over other objects
_HUE_SPREAD: Final = 0.06

FloatArray = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]


def generate_scene(
    seed: int | tuple[int, ...], size_hw: tuple[int, int] = (128, 160)
) -> tuple[UInt8Array, UInt8Array]:
    """Return an image, RGB uint8 [H, W, 3], and its class ids of SCENE_CLASSES, uint8 [H, W].

    The same seed and size give the same bits.
    """
    rng = np.random.default_rng(seed)
    image = _background(rng, size_hw)  # [H, W, 3] in 0..1
    labels = np.zeros(size_hw, np.uint8)
    num_left = int(rng.integers(3, 6))
    for _ in range(_MAX_ATTEMPTS):
        class_id = int(rng.integers(1, SCENE_CLASSES.num_classes))
        num_left -= _paint_object(rng, image, labels, class_id)
        if num_left == 0:
            break
    image = cv2.GaussianBlur(image, (3, 3), 0.5).astype(np.float32, copy=False)
    image *= rng.uniform(0.85, 1.1)
    image += rng.normal(0, 0.025, image.shape).astype(np.float32)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8), labels


def write_scenes(
    root: Path,
    *,
    train: int,
    val: int,
    test: int = 0,
    size_hw: tuple[int, int] = (128, 160),
    seed: int = 0,
) -> None:
    """Write `root/{train,val,test}/{images,masks}` and `root/classes.json`; all scenes differ."""
    for split_index, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
        for index in range(count):
            image, labels = generate_scene((seed, split_index, index), size_hw)
            name = f"scene_{index:04d}"
            write_jpeg(root / split / "images" / f"{name}.jpg", image, quality=95)
            write_png(root / split / "masks" / f"{name}.png", labels, SCENE_CLASSES.palette())
    text = json.dumps(SCENE_CLASSES.to_dict(), indent=1)
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(text + "\n", encoding="utf-8")


def _background(rng: np.random.Generator, size_hw: tuple[int, int]) -> FloatArray:
    """Return a noisy gradient of two dull colors with untextured clutter in object colors."""
    height, width = size_hw
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5) + 0.5
    first, second = (
        _color(rng.random(), rng.uniform(0.1, 0.35), rng.uniform(0.35, 0.8)) for _ in "ab"
    )
    image = first + (second - first) * ramp.clip(0, 1)[..., None]
    for cells, strength in ((4, 0.10), (12, 0.06), (40, 0.05)):
        grid = (cells, cells * width // height + 1)
        gray = rng.normal(0, strength, grid)[..., None]
        coarse = (gray + rng.normal(0, 0.3 * strength, (*grid, 3))).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    layer = np.ascontiguousarray(image)
    for _ in range(int(rng.integers(4, 9))):
        _paint_clutter(rng, layer)
    soft = cv2.GaussianBlur(layer, (0, 0), max(0.5, min(size_hw) / 160))
    mixed: FloatArray = (0.3 * image + 0.7 * soft).astype(np.float32)
    return mixed


def _paint_clutter(rng: np.random.Generator, layer: FloatArray) -> None:
    """Draw an ellipse or a line without texture, in the colors of some class."""
    height, width = layer.shape[:2]
    color = _object_colors(rng, int(rng.integers(1, SCENE_CLASSES.num_classes)))[0].tolist()
    axes = tuple(int(min(height, width) * rng.uniform(0.03, 0.16)) for _ in range(2))
    points = [(int(rng.integers(0, width)), int(rng.integers(0, height))) for _ in range(2)]
    if rng.random() < 0.6:
        cv2.ellipse(layer, points[0], axes, rng.uniform(0, 180), 0, 360, color, -1)
    else:
        cv2.line(layer, points[0], points[1], color, max(1, axes[0] // 4))


def _paint_object(
    rng: np.random.Generator, image: FloatArray, labels: UInt8Array, class_id: int
) -> bool:
    """Paint an object and its shadow, unless it covers too much of others; return whether."""
    window, u, v, unit_px = _place(rng, (labels.shape[0], labels.shape[1]))
    distance, texture = _SHAPES[class_id](rng, u, v)
    inside_px = -distance * unit_px  # > 0 inside, roughly in pixels
    below = labels[window][inside_px > 0]
    if np.count_nonzero(below) > _MAX_OVERLAP * below.size:
        return False
    light, dark = _object_colors(rng, class_id)
    colors = dark + (light - dark) * texture[..., None]
    # Darker toward the edge, for a rounded look.
    colors *= (0.72 + 0.38 * (inside_px / (0.3 * unit_px)).clip(0, 1))[..., None]
    patch = image[window]
    patch *= (1 - 0.45 * _shadow(inside_px > 0, unit_px * 0.1))[..., None]
    alpha = (inside_px + 0.5).clip(0, 1)[..., None]
    patch += alpha * (colors - patch)
    labels[window][inside_px > 0] = class_id
    return True


def _shadow(shape: npt.NDArray[np.bool_], depth_px: float) -> FloatArray:
    """Return the shape, blurred and shifted down and to the right."""
    shift = max(1, round(depth_px))
    moved = np.zeros(shape.shape, np.float32)
    moved[shift:, shift:] = shape[:-shift, :-shift]
    return cast(FloatArray, cv2.GaussianBlur(moved, (0, 0), depth_px))


def _place(
    rng: np.random.Generator, size_hw: tuple[int, int]
) -> tuple[tuple[slice, slice], FloatArray, FloatArray, float]:
    """Draw scale, rotation, shear, bend and position of an object.

    Returns:
        A window of the image, its object coordinates u and v, [h, w], in units of the object's
        radius, and the pixels of a unit.
    """
    height, width = size_hw
    unit_px = 0.22 * min(size_hw) * float(np.exp(rng.uniform(np.log(0.6), np.log(1.6))))
    center_y, center_x = rng.uniform(0.16, 0.84) * height, rng.uniform(0.16, 0.84) * width
    reach = 2.3 * unit_px
    top, left = max(0, int(center_y - reach)), max(0, int(center_x - reach))
    bottom, right = min(height, int(center_y + reach) + 1), min(width, int(center_x + reach) + 1)
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    y, x = (y - center_y) / unit_px, (x - center_x) / unit_px
    angle, shear = rng.uniform(0, 2 * np.pi), rng.uniform(-0.35, 0.35)
    u = np.cos(angle) * x + np.sin(angle) * y
    v = -np.sin(angle) * x + np.cos(angle) * y + shear * u
    phases = rng.uniform(0, 2 * np.pi, 2)
    bend, wobble = rng.uniform(-0.22, 0.22), rng.uniform(0.03, 0.10)
    warped_u = u + wobble * np.sin(2.2 * v + phases[0])
    warped_v = v + wobble * np.sin(2.2 * u + phases[1]) + bend * (u * u - 0.5)
    window = (slice(top, bottom), slice(left, right))
    return window, warped_u.astype(np.float32), warped_v.astype(np.float32), unit_px


def _snake(rng: np.random.Generator, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
    center_line = rng.uniform(0.2, 0.4) * np.sin(rng.uniform(2.2, 3.4) * u + rng.uniform(0, 6.28))
    across, beyond = v - center_line, np.maximum(np.abs(u) - 1.45, 0)
    stripes = np.sin(2 * np.pi * (u / rng.uniform(0.3, 0.4) + rng.random()))
    return np.hypot(across, beyond) - rng.uniform(0.26, 0.36), _contrast(stripes)


def _leaf(rng: np.random.Generator, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
    outline = rng.uniform(0.5, 0.65) * (1 - (u / 1.35) ** 2)
    cells = np.pi / rng.uniform(0.2, 0.27)
    checker = np.sin(cells * u) * np.sin(cells * v)
    return np.abs(v) - outline, _contrast(3 * checker)


def _ladybird(
    rng: np.random.Generator, u: FloatArray, v: FloatArray
) -> tuple[FloatArray, FloatArray]:
    radius = np.hypot(u, v / rng.uniform(0.7, 0.95))
    pitch = rng.uniform(0.36, 0.46)
    row = np.floor(v / pitch)
    du = (u / pitch + 0.5 * (row % 2)) % 1 - 0.5
    dv = (v / pitch) % 1 - 0.5
    return radius - 0.92, _contrast(8 * (np.hypot(du, dv) - 0.27))


def _star(rng: np.random.Generator, u: FloatArray, v: FloatArray) -> tuple[FloatArray, FloatArray]:
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    outline = 0.78 + rng.uniform(0.26, 0.36) * np.cos(5 * angle)
    rings = np.sin(2 * np.pi * (radius / rng.uniform(0.26, 0.34) + rng.random()))
    return (radius - outline) * 0.7, _contrast(rings)


_Shape = Callable[[np.random.Generator, FloatArray, FloatArray], tuple[FloatArray, FloatArray]]
# Each returns the approximate signed distance to the shape, in units, and the texture in 0..1.
_SHAPES: Final[dict[int, _Shape]] = {1: _snake, 2: _leaf, 3: _ladybird, 4: _star}


def _contrast(wave: FloatArray) -> FloatArray:
    """Map a wave in -1..1 to nearly binary values in 0..1 with soft steps."""
    return (0.5 + 1.2 * wave).clip(0, 1).astype(np.float32)


def _object_colors(rng: np.random.Generator, class_id: int) -> tuple[FloatArray, FloatArray]:
    """Return the light and the dark color of an object, around the hue of its class."""
    hue = _HUES[class_id] + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD)
    light = _color(hue, rng.uniform(0.35, 0.75), rng.uniform(0.85, 1.0))
    dark = _color(hue + rng.uniform(-0.03, 0.03), rng.uniform(0.5, 0.95), rng.uniform(0.25, 0.5))
    return light, dark


def _color(hue: float, saturation: float, value: float) -> FloatArray:
    """HSV in 0..1 (the hue wraps around) -> RGB float32 [3] in 0..1."""
    sextants = (hue * 6 + np.array([5.0, 3.0, 1.0])) % 6
    rgb = value - value * saturation * np.clip(np.minimum(sextants, 4 - sextants), 0, 1)
    return rgb.astype(np.float32)
