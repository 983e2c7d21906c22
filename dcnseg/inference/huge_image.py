"""Prediction of huge and georeferenced images in bounded memory; entry point `predict_raster`.

The image is read, predicted and written from top to bottom, a few rows at a time. The windows are
those of the whole image, so the labels equal those of `Predictor.predict`. Where the results of a
row of windows would take too much memory, the image is also split into groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from dcnseg.config import OVERLAY_OPACITY
from dcnseg.data.raster_file import (
    READ_ROWS,
    RasterImage,
    can_be_georeferenced,
    has_rasterio,
    read_raster_header,
)
from dcnseg.errors import ConfigError
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.raster_output import (
    TILE,
    BoolArray,
    RasterOutputs,
    Strip,
    UInt8Array,
    explain_write_errors,
)
from dcnseg.inference.results import round_shares
from dcnseg.inference.sliding_window import compute_window_starts, find_window_columns

MAX_MAP_BYTES: Final = 512 << 20  # of the results of windows that are not blended yet
WHOLE_IMAGE_KINDS: Final = ("probabilities", "regions")

OnWindow = Callable[[int, int], None]


@dataclass(frozen=True)
class RasterSummary:
    """Statistics of a prediction. The class shares and `share_below` add up to 1.

    Attributes:
        size_hw: Height and width in pixels.
        class_shares: Share of each predicted class among the valid pixels, by name.
        share_below: Share of the valid pixels below the minimum confidence.
        is_gray: Whether the image has no color.
    """

    size_hw: tuple[int, int]
    class_shares: dict[str, float]
    share_below: float
    is_gray: bool


def needs_whole_image(predictor: Predictor, kinds: Collection[str]) -> bool:
    """Whether a prediction with these outputs needs the whole image in memory."""
    return predictor.config.min_region_score > 0 or not set(kinds).isdisjoint(WHOLE_IMAGE_KINDS)


def check_raster_outputs(predictor: Predictor, kinds: Collection[str]) -> None:
    """Raise a ConfigError if these outputs need the whole image in memory."""
    if needs_whole_image(predictor, kinds):
        raise ConfigError(
            "the image is predicted window by window; probabilities, regions and "
            "--min-region-score need the whole image in memory. Use --save with labels, overlay "
            "and confidence only, without --min-region-score, or split the image."
        )


def is_read_by_windows(
    path: Path, *, is_readable: bool, needs_whole: bool, has_bands: bool
) -> bool:
    """Whether `dcnseg predict` predicts an image window by window.

    Args:
        path: The image.
        is_readable: Whether `read_image` reads it: it is not too large and has 1, 3 or 4 bands.
        needs_whole: Whether the outputs need the whole image, see `needs_whole_image`.
        has_bands: Whether the bands were chosen.
    """
    if not has_rasterio():
        return False
    if not is_readable:
        return read_raster_header(path) is not None
    if has_bands or needs_whole or not can_be_georeferenced(path):
        return has_bands
    header = read_raster_header(path)
    return header is not None and header.is_georeferenced


@torch.inference_mode()
def predict_raster(
    predictor: Predictor,
    raster: RasterImage,
    paths: dict[str, Path],
    *,
    opacity: float = OVERLAY_OPACITY,
    on_window: OnWindow | None = None,
) -> RasterSummary:
    """Predict an image window by window, and write the outputs.

    Invalid pixels (nodata, masked or transparent) get the ignored id; if every id is a class, they
    are predicted like the others.

    Args:
        predictor: The network; all of its settings but `min_region_score` apply.
        raster: The image, from `open_raster`.
        paths: Files to write by kind: labels (GeoTIFF of class ids, with colors, names and the
            georeference of the image), confidence (GeoTIFF of the probability of the class times
            255) and overlay (JPEG of at most 4096 pixels). Each appears complete or not at all.
        opacity: Of the overlay's colors, in [0, 1].
        on_window: Called with the number of predicted windows and of all windows.

    Raises:
        ConfigError: An output needs the whole image in memory.
        DataError: The image is damaged, or has values that are not finite.
        NotFiniteError: The network's output has NaN or infinity.
        OSError: An output cannot be written.
    """
    check_raster_outputs(predictor, paths)
    groups = _split_columns(predictor, raster.size_hw[1])
    progress = _Progress(predictor, raster.size_hw, groups, on_window or (lambda *_: None))
    with explain_write_errors(next(iter(paths.values())).parent), ExitStack() as files:
        outputs = RasterOutputs(files, raster, predictor.class_map, paths)
        for columns in groups:
            outputs.start_columns(columns)
            _predict_columns(predictor, raster, columns, outputs, progress)
            outputs.finish_columns()
        progress.finish()
        if "overlay" in paths:
            outputs.write_overlay(paths["overlay"], opacity)
    below, shares = round_shares(outputs.counts.of_index, predictor.class_map)
    return RasterSummary(raster.size_hw, shares, below, outputs.counts.is_gray)


def _predict_columns(
    predictor: Predictor,
    raster: RasterImage,
    columns: slice,
    outputs: RasterOutputs,
    progress: _Progress,
) -> None:
    height, width = raster.size_hw
    side = min(predictor.window_side, width)
    lefts = find_window_columns(width, side, predictor.config.overlap, columns)
    pixels = _RowBuffer(
        raster,
        slice(lefts[0], lefts[-1] + side),
        num_rows=min(predictor.window_side, height),
        has_mask=raster.has_mask and bool(predictor.class_map.ignored_ids),
    )

    def read_window(rows: slice, window_columns: slice) -> UInt8Array | None:
        progress.advance()
        pixels.load(rows)
        image, is_valid = pixels.get(rows, window_columns)
        return image if is_valid is None or is_valid.any() else None

    for top, strip in predictor.predict_strips(read_window, raster.size_hw, columns=columns):
        labels, highest = predictor.label_strip(strip)
        image, is_valid = pixels.get(slice(top, top + len(labels)), columns)
        # Copies, because the buffer is overwritten by the next rows.
        valid_copy = None if is_valid is None else is_valid.copy()
        outputs.add(Strip(labels, highest.half().cpu().numpy(), image.copy(), valid_copy))


class _RowBuffer:
    """The rows of an image that the current windows cover; each row is read once."""

    def __init__(
        self, raster: RasterImage, columns: slice, *, num_rows: int, has_mask: bool
    ) -> None:
        self._raster = raster
        self._columns = columns
        width = columns.stop - columns.start
        self._image = np.empty((num_rows, width, 3), np.uint8)
        self._is_valid: BoolArray | None = np.ones((num_rows, width), bool) if has_mask else None
        self._first = self._last = 0  # rows in the buffer

    def load(self, rows: slice) -> None:
        """Drop the rows before these, and read those that are missing; `rows` never go back."""
        dropped, kept = rows.start - self._first, self._last - rows.start
        for buffer in (self._image, self._is_valid):
            if buffer is not None and dropped and kept > 0:
                buffer[:kept] = buffer[dropped : dropped + kept]
        self._first, self._last = rows.start, max(rows.start, self._last)
        while self._last < rows.stop:
            last = min(self._last + READ_ROWS, rows.stop)
            image, is_valid = self._raster.read(slice(self._last, last), self._columns)
            place = slice(self._last - self._first, last - self._first)
            self._image[place] = image
            if self._is_valid is not None and is_valid is not None:
                self._is_valid[place] = is_valid
            self._last = last

    def get(self, rows: slice, columns: slice) -> tuple[UInt8Array, BoolArray | None]:
        """Return the pixels of a part of the rows, and which are valid; None if all are."""
        place = (
            slice(rows.start - self._first, rows.stop - self._first),
            slice(columns.start - self._columns.start, columns.stop - self._columns.start),
        )
        return self._image[place], None if self._is_valid is None else self._is_valid[place]


class _Progress:
    """Counts the windows of an image."""

    def __init__(
        self,
        predictor: Predictor,
        size_hw: tuple[int, int],
        groups: list[slice],
        on_window: OnWindow,
    ) -> None:
        side, overlap = predictor.window_side, predictor.config.overlap
        height, width = size_hw
        num_columns = sum(
            len(find_window_columns(width, min(side, width), overlap, columns))
            for columns in groups
        )
        self._total = num_columns * len(compute_window_starts(height, side, overlap))
        self._started = 0
        self._on_window = on_window

    def advance(self) -> None:
        """Start a window; the one before is done."""
        if self._started:
            self._on_window(self._started, self._total)
        self._started += 1

    def finish(self) -> None:
        """Report that all windows are done."""
        self._on_window(self._total, self._total)


def _split_columns(predictor: Predictor, width: int) -> list[slice]:
    """Split the columns into groups whose maps fit into MAX_MAP_BYTES, at multiples of TILE.

    The windows at the edge of two groups are predicted for both, so that a group has at least the
    width of two windows.
    """
    cover = 1 / (1 - predictor.config.overlap)  # windows over a pixel, in each direction
    rows = predictor.window_side * (1 + cover)
    fitting = int(MAX_MAP_BYTES / (predictor.map_bytes * rows * cover))
    num_groups = -(-width // max(fitting, 2 * predictor.window_side))
    step = -(-width // num_groups // TILE) * TILE
    return [slice(left, min(left + step, width)) for left in range(0, width, step)]
