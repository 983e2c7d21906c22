"""The data of an explorer page in compact form; entry point `make_payload`.

Offsets are fixed-point numbers: int16 times a power of two for each layer, so that they are exact
in float32. Layers whose offsets are too large for that keep float32. Arrays are little-endian, one
after the other, compressed with zlib and encoded in base64.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import ClassMap
from dcnseg.inference.overlay import overlay_colors
from dcnseg.visualize.measures.pixel_groups import PixelGroups
from dcnseg.visualize.offsets import CASCADE_DEPTH, LayerOffsets, compute_tap_steps

MAX_POINTS: Final = 50_000  # of one cascade; with many offset groups, it has fewer layers
MAX_ERROR_PX: Final = 1 / 16  # of a sampling point of a cascade, in image pixels
MAX_LAYER_BYTES: Final = 12 << 20  # of all layers, before base64
MAX_LABELS_SIDE: Final = 1600  # larger label maps are scaled down
NOT_FINITE: Final = -32768  # stands for NaN among int16 offsets
MASK_STEPS: Final = 127  # uint8 steps of the modulation for each 1; the values are 0 to 254
MASK_NOT_FINITE: Final = 255
_LEAST_EXPONENT: Final = -20
_MAX_INT16: Final = 32767

UInt8Array = npt.NDArray[np.uint8]


@dataclass
class Blob:
    """Arrays one after the other, in one piece of text."""

    _parts: list[bytes] = field(default_factory=list)
    _size: int = 0

    def add(self, array: npt.NDArray[Any]) -> dict[str, Any]:
        """Append an array, and return its place and type for the page."""
        part = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        entry = {"type": array.dtype.name, "start": self._size, "bytes": len(part)}
        self._parts.append(part)
        self._size += len(part)
        return entry

    def encode(self) -> str:
        """Return the arrays compressed and in base64."""
        return base64.b64encode(zlib.compress(b"".join(self._parts))).decode()


def make_payload(
    layers: Sequence[LayerOffsets],
    class_map: ClassMap,
    prediction: UInt8Array | None,
    labels: UInt8Array | None,
) -> tuple[dict[str, Any], str]:
    """Return the values for the page's JSON, and the text of its arrays.

    Args:
        layers: In forward order.
        class_map: Names and colors.
        prediction: Training indices, uint8 [H, W], or None.
        labels: The true classes like `prediction`; 255 is ignored.
    """
    blob = Blob()
    colors = overlay_colors(class_map).tolist()
    values = {
        "layers": [_make_layer_entry(layer, blob) for layer in layers],
        "classes": [
            {"name": name, "color": colors[i], "isObject": i in class_map.object_indices}
            for i, name in enumerate(class_map.names)
        ],
        "prediction": _make_labels_entry(prediction, class_map, blob),
        "truth": _make_labels_entry(labels, class_map, blob),
        "cascadeDepth": CASCADE_DEPTH,
        "maxPoints": MAX_POINTS,
    }
    return values, blob.encode()


def select_layers(layers: Sequence[LayerOffsets]) -> list[LayerOffsets]:
    """Return the last layers that fit into `MAX_LAYER_BYTES`, at least one."""
    kept: list[LayerOffsets] = []
    size = 0
    for layer in reversed(layers):
        size += quantize_offset(layer)[0].nbytes
        size += 0 if layer.mask is None else layer.mask.numel()
        if kept and size > MAX_LAYER_BYTES:
            break
        kept.insert(0, layer)
    return kept


def quantize_offset(layer: LayerOffsets) -> tuple[npt.NDArray[Any], float]:
    """Return the offsets [G, T, 2, H_out, W_out] as int16 or float32, and the unit in map pixels.

    int16 is used if all offsets but NaN are finite and the error of a cascade of such layers stays
    below `MAX_ERROR_PX`.
    """
    offset = layer.offset.numpy()
    is_nan = np.isnan(offset)
    largest = float(np.abs(offset, where=~is_nan, out=np.zeros_like(offset)).max())
    if math.isfinite(largest):
        exponent = math.ceil(math.log2(largest / _MAX_INT16)) if largest > 0 else _LEAST_EXPONENT
        unit = 2.0 ** max(exponent, _LEAST_EXPONENT)
        if _unit_error_px(layer, unit) * CASCADE_DEPTH <= MAX_ERROR_PX:
            steps = np.rint(np.where(is_nan, 0, offset) / unit)
            return np.where(is_nan, NOT_FINITE, steps).astype(np.int16), unit
    return offset.astype(np.float32), 1.0


def compute_error_px(layers: Sequence[LayerOffsets]) -> float:
    """Return the greatest error of a sampling point along an axis, in image pixels."""
    errors = []
    for layer in layers:
        steps, unit = quantize_offset(layer)
        errors.append(_unit_error_px(layer, unit) if steps.dtype == np.int16 else 0.0)
    return sum(sorted(errors)[-CASCADE_DEPTH:])


def _unit_error_px(layer: LayerOffsets, unit: float) -> float:
    return unit / 2 * max(layer.input_geometry.stride_px)


def _make_layer_entry(layer: LayerOffsets, blob: Blob) -> dict[str, Any]:
    steps, unit = quantize_offset(layer)
    groups, taps = steps.shape[:2]
    mask = None
    if layer.mask is not None:
        scaled = np.rint(np.nan_to_num(layer.mask.numpy(), nan=0.0) * MASK_STEPS)
        is_nan = np.isnan(layer.mask.numpy())
        mask = blob.add(np.where(is_nan, MASK_NOT_FINITE, scaled).astype(np.uint8))
    output = layer.output_geometry
    return {
        "name": layer.name,
        "groups": groups,
        "taps": taps,
        "kernel": layer.grid.kernel_size,
        "size": steps.shape[-2:],
        "unit": unit,
        "offset": blob.add(steps),
        "mask": mask,
        "tapSteps": compute_tap_steps(layer.grid).tolist(),
        "inputStride": layer.input_geometry.stride_px,
        "outputStride": output.stride_px,
        "outputOrigin": output.origin_px,
        "plainDilation": layer.plain_dilation_px if layer.grid.num_taps > 1 else None,
    }


def _make_labels_entry(
    labels: UInt8Array | None, class_map: ClassMap, blob: Blob
) -> dict[str, Any] | None:
    if labels is None:
        return None
    numbers = PixelGroups.from_labels(labels, class_map).numbers
    has_few = numbers.max() <= _MAX_INT16
    places = _choose_pixels(labels.shape)
    small = labels[places]
    return {
        "height": small.shape[0],
        "width": small.shape[1],
        "labels": blob.add(small),
        "objects": blob.add(numbers[places].astype(np.int16 if has_few else np.int32)),
    }


def _choose_pixels(size_hw: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], ...]:
    """Return the indices of evenly spaced pixels, at most `MAX_LABELS_SIDE` on a side."""
    factor = max(1.0, max(size_hw) / MAX_LABELS_SIDE)
    places = []
    for size in size_hw:
        count = max(1, int(size / factor))
        places.append(((np.arange(count) + 0.5) * size / count).astype(np.int64))
    return np.ix_(*places)
