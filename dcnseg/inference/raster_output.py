"""Writing of the prediction of a huge image, from top to bottom; entry point `RasterOutputs`.

Label map and confidence are tiled GeoTIFF files, the overlay is reduced to at most 4096 pixels.
"""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import IGNORE_INDEX, ClassMap
from dcnseg.data.image_io import is_gray
from dcnseg.data.raster_file import RasterImage
from dcnseg.files import atomic_path
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.writers import confidence_to_gray, write_prediction

if TYPE_CHECKING:
    from rasterio.io import DatasetWriter

TILE: Final = 512
MAX_OVERLAY_SIDE: Final = 4096
_FULL_DISK: Final = 1 << 20  # free bytes; less is what a failed write leaves
_NO_CONFIDENCE: Final = 0  # of invalid pixels

UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Strip:
    """Prediction of a few rows, [rows, columns].

    Attributes:
        labels: Training indices, uint8.
        confidence: Probability of the label, float16.
        image: The image itself, RGB, uint8 [rows, columns, 3].
        is_valid: Which pixels are valid; None: all of them.
    """

    labels: UInt8Array
    confidence: npt.NDArray[np.float16]
    image: UInt8Array
    is_valid: BoolArray | None


@dataclass
class LabelCounts:
    """Statistics of the rows that were written so far."""

    of_index: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    is_gray: bool = True  # whether no pixel has a color

    def add(self, strip: Strip) -> None:
        """Count the valid pixels of a strip."""
        for i, row in enumerate(strip.labels):  # bincount converts its input to int64
            valid = row if strip.is_valid is None else row[strip.is_valid[i]]
            self.of_index += np.bincount(valid, minlength=256)
        self.is_gray = self.is_gray and is_gray(strip.image)


class RasterOutputs:
    """The output files of one image.

    Strips are collected to rows of tiles, so that each tile is compressed once. The files appear
    when `files` is closed, the label map last, and not at all after an exception.
    """

    def __init__(
        self,
        files: ExitStack,
        raster: RasterImage,
        class_map: ClassMap,
        paths: dict[str, Path],
    ) -> None:
        self.counts = LabelCounts()
        self._class_map = class_map
        self._overview = _Overview(raster.size_hw) if "overlay" in paths else None
        self._labels: _TiledFile | None = None
        self._confidence: _TiledFile | None = None
        if "labels" in paths:
            dtype = Prediction(np.zeros((1, 1), np.uint8), class_map).label_map.dtype
            nodata = _ignored_id(class_map)
            created = _created(paths["labels"], raster, class_map, str(dtype), nodata)
            self._labels = files.enter_context(created)
        if "confidence" in paths:
            nodata = _NO_CONFIDENCE if raster.has_mask else None
            created = _created(paths["confidence"], raster, None, "uint8", nodata)
            self._confidence = files.enter_context(created)

    def start_columns(self, columns: slice) -> None:
        """Start at the top row of these columns; their start is a multiple of TILE."""
        self._columns = columns
        self._top = 0
        self._waiting: list[Strip] = []

    def add(self, strip: Strip) -> None:
        """Add the next rows of the current columns."""
        self._waiting.append(strip)
        while sum(len(part.labels) for part in self._waiting) >= TILE:
            whole = _join(self._waiting)
            self._waiting = [_rows_of(whole, slice(TILE, None))]
            self._write(_rows_of(whole, slice(0, TILE)))

    def finish_columns(self) -> None:
        """Write the remaining rows of the current columns."""
        rest = _join(self._waiting)
        if len(rest.labels):
            self._write(rest)

    def write_overlay(self, path: Path, opacity: float) -> None:
        """Write the overlay of the whole image as JPEG."""
        assert self._overview is not None
        image, labels = self._overview.image, self._overview.labels
        prediction = Prediction(labels, self._class_map, image=image)
        write_prediction(prediction, image, {"overlay": path}, opacity=opacity)

    def _write(self, strip: Strip) -> None:
        self.counts.add(strip)
        labels, gray = strip.labels, None
        if self._confidence is not None:
            gray = confidence_to_gray(strip.confidence)
        if strip.is_valid is not None:
            labels = np.where(strip.is_valid, labels, np.uint8(IGNORE_INDEX))
            gray = None if gray is None else np.where(strip.is_valid, gray, _NO_CONFIDENCE)
        top, left = self._top, self._columns.start
        if self._labels is not None:
            self._labels.write(Prediction(labels, self._class_map).label_map, top, left)
        if self._confidence is not None and gray is not None:
            self._confidence.write(gray.astype(np.uint8), top, left)
        if self._overview is not None:
            self._overview.add(top, left, strip.image, labels)
        self._top += len(labels)


class _Overview:
    """The image and its labels, reduced by a power of two that divides TILE."""

    def __init__(self, size_hw: tuple[int, int]) -> None:
        self._factor = 1
        while -(-max(size_hw) // self._factor) > MAX_OVERLAY_SIDE and self._factor < TILE:
            self._factor *= 2
        height, width = (-(-side // self._factor) for side in size_hw)
        self.image = np.zeros((height, width, 3), np.uint8)
        self.labels = np.full((height, width), IGNORE_INDEX, np.uint8)

    def add(self, top: int, left: int, image: UInt8Array, labels: UInt8Array) -> None:
        """Add a part of the image; `top` and `left` are multiples of the factor."""
        factor = self._factor
        height, width = labels.shape
        small_h, small_w = -(-height // factor), -(-width // factor)
        place = (
            slice(top // factor, top // factor + small_h),
            slice(left // factor, left // factor + small_w),
        )
        missing = small_h * factor - height, small_w * factor - width
        padded = cv2.copyMakeBorder(image, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
        self.image[place] = cv2.resize(padded, (small_w, small_h), interpolation=cv2.INTER_AREA)
        rows = np.minimum(np.arange(small_h) * factor + factor // 2, height - 1)
        columns = np.minimum(np.arange(small_w) * factor + factor // 2, width - 1)
        self.labels[place] = labels[rows[:, None], columns]


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Raise an OSError with the reason if rasterio cannot write because the disk is full."""
    import rasterio

    try:
        yield
    except rasterio.errors.RasterioIOError as error:
        if shutil.disk_usage(folder).free < _FULL_DISK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise OSError(f"cannot be written ({error.__cause__ or error})") from error


class _TiledFile:
    """A GeoTIFF of one band that is being written."""

    def __init__(self, dataset: DatasetWriter) -> None:
        self.total = 0  # sum of the values
        self._dataset = dataset

    def write(self, values: npt.NDArray[Any], top: int, left: int) -> None:
        """Write whole tiles, or those at the edge of the image."""
        from rasterio.windows import Window

        height, width = values.shape
        self._dataset.write(values, 1, window=Window(left, top, width, height))
        self.total += int(values.sum(dtype=np.int64))


@contextmanager
def _created(
    path: Path, raster: RasterImage, class_map: ClassMap | None, dtype: str, nodata: int | None
) -> Iterator[_TiledFile]:
    """Create a tiled GeoTIFF with the georeference of `raster`; with `class_map`, of class ids."""
    import rasterio

    height, width = raster.size_hw
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            dataset: DatasetWriter = rasterio.open(
                temporary.absolute(),
                "w",
                driver="GTiff",
                height=height,
                width=width,
                count=1,
                dtype=dtype,
                nodata=nodata,
                tiled=True,
                blockxsize=TILE,
                blockysize=TILE,
                compress="deflate",
                BIGTIFF="IF_SAFER",
                **raster.georeference,
            )
        with dataset:
            # Before the first pixels, which end the header.
            description = "probability of the class times 255"
            if class_map is not None:
                description = "class id"
                _describe_classes(dataset, class_map)
            dataset.set_band_description(1, description)
            file = _TiledFile(dataset)
            yield file
        _verify(temporary, file.total, description)


def _verify(path: Path, total: int, description: str) -> None:
    """Read a file again, because rasterio reports no error of its last writes.

    Raises:
        RasterioIOError: The file is incomplete.
    """
    import rasterio
    from rasterio.windows import Window

    found = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        dataset = rasterio.open(path.absolute(), driver="GTiff")
    with dataset:
        for top in range(0, dataset.height, TILE):
            window = Window(0, top, dataset.width, min(TILE, dataset.height - top))
            found += int(dataset.read(1, window=window).sum(dtype=np.int64))
        is_complete = found == total and dataset.descriptions == (description,)
    if not is_complete:
        raise rasterio.errors.RasterioIOError("the written file is incomplete")


def _describe_classes(dataset: DatasetWriter, class_map: ClassMap) -> None:
    """Add the colors and names of the classes."""
    if dataset.dtypes[0] == "uint8":
        dataset.write_colormap(1, dict(enumerate(map(tuple, class_map.palette().tolist()))))
    dataset.update_tags(1, **{f"class_{entry.id}": entry.name for entry in class_map.classes})


def _ignored_id(class_map: ClassMap) -> int | None:
    """Return the id of ignored pixels in label maps; None if every id is a class."""
    if not class_map.ignored_ids:
        return None
    return int(class_map.decode_indices(np.array([IGNORE_INDEX]))[0])


def _join(strips: list[Strip]) -> Strip:
    if len(strips) == 1:
        return strips[0]
    masks = [strip.is_valid for strip in strips if strip.is_valid is not None]
    return Strip(
        np.concatenate([strip.labels for strip in strips]),
        np.concatenate([strip.confidence for strip in strips]),
        np.concatenate([strip.image for strip in strips]),
        np.concatenate(masks) if masks else None,
    )


def _rows_of(strip: Strip, rows: slice) -> Strip:
    is_valid = None if strip.is_valid is None else strip.is_valid[rows]
    return Strip(strip.labels[rows], strip.confidence[rows], strip.image[rows], is_valid)
