"""Measures of the offsets over the objects of an image; entry point `measure_object_dilations`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcnseg.inference.predictor import Predictor
from dcnseg.scoring.objects import find_objects
from dcnseg.visualize.offsets import (
    LayerOffsets,
    capture_offsets,
    compute_effective_dilation,
    limit_size,
)

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ObjectDilation:
    """The mean effective dilation of a layer at an object, in image pixels."""

    layer: str
    area: int  # of the object, in pixels
    dilation_px: float


def measure_object_dilations(
    predictor: Predictor, image: UInt8Array, labels: UInt8Array
) -> list[ObjectDilation]:
    """Average the effective dilation of each deformable layer over each object of a label map.

    Objects that contain no output location of a layer are skipped.

    Args:
        predictor: A predictor whose network has deformable layers.
        image: RGB, uint8 [H, W, 3].
        labels: Training indices, uint8 [H, W].

    Raises:
        ConfigError: The network has no deformable layer.
    """
    objects = find_objects(labels, predictor.class_map.object_indices)
    layers = capture_offsets(predictor.model, limit_size(predictor.prepare(image)), image.shape[:2])
    return [
        ObjectDilation(layer.name, int(objects.areas[i - 1]), dilation)
        for layer in layers
        for i, dilation in _mean_dilations(layer, objects.numbers).items()
    ]


def _mean_dilations(layer: LayerOffsets, objects: npt.NDArray[np.int32]) -> dict[int, float]:
    """The mean effective dilation of a layer by object; 0 is no object."""
    geometry = layer.output_geometry
    dilation = compute_effective_dilation(layer).numpy()
    rows, columns = (
        np.rint(origin + stride * np.arange(size)).astype(np.int64)
        for origin, stride, size in zip(
            geometry.origin_px, geometry.stride_px, dilation.shape, strict=True
        )
    )
    is_row, is_column = (
        (places >= 0) & (places < size)
        for places, size in zip((rows, columns), objects.shape, strict=True)
    )
    found = objects[np.ix_(rows[is_row], columns[is_column])].ravel()
    values = dilation[np.ix_(is_row, is_column)].ravel()
    counts, sums = np.bincount(found), np.bincount(found, weights=values)
    return {int(i): float(sums[i] / counts[i]) for i in np.flatnonzero(counts) if i > 0}
