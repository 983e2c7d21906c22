"""Images of any size that are read window by window through rasterio; entry point `open_raster`.

Pixels are converted as by `read_image`: gray and palette images become RGB, deeper images are
scaled by their range, and transparent pixels are blended with white. rasterio is optional.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from dcnseg.data.image_file import is_raw_file, tiff_orientation
from dcnseg.data.image_io import UInt8Array, scale_to_bytes
from dcnseg.errors import ConfigError, DataError, short_repr
from dcnseg.files import open_regular_file

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

INSTALL_RASTERIO: Final = 'pip install "dcnseg[geo]"'
READ_ROWS: Final = 256  # rows decoded at a time, to keep temporary arrays small
_GDAL_OPTIONS: Final = {
    "GDAL_CACHEMAX": 256 << 20,  # bytes of decoded blocks; the default is 5 % of the memory
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": False,  # it ignores that a file is truncated
}
# One driver by the first bytes, so that files reach none of GDAL's drivers that open other files.
_DRIVERS: Final = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",  # BigTIFF
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP  ": "JP2OpenJPEG",
    b"\xffO\xffQ": "JP2OpenJPEG",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
}
_GEO_DRIVERS: Final = ("GTiff", "JP2OpenJPEG")
_FORMATS_TEXT: Final = "TIFF, JPEG 2000, PNG or JPEG"
_NUM_COLORS: Final = 3

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RasterHeader:
    """Facts about an image file that rasterio opens."""

    size_hw: tuple[int, int]
    is_georeferenced: bool


def has_rasterio() -> bool:
    """Whether rasterio is installed."""
    return find_spec("rasterio") is not None


def check_bands(bands: Sequence[int]) -> None:
    """Raise a ConfigError unless `bands` are three band numbers, or empty, and can be used."""
    if not bands:
        return
    if len(bands) != _NUM_COLORS or min(bands) < 1:
        raise ConfigError(
            f"--bands is {short_repr(','.join(map(str, bands)))}; expected the numbers of the "
            "bands for red, green and blue, counted from 1, such as 1,2,3."
        )
    if not has_rasterio():
        raise ConfigError(f"--bands needs rasterio, which is not installed: {INSTALL_RASTERIO}.")


def suggest_rasterio(error: DataError) -> DataError:
    """Add to the error of an image that is too large to be read as a whole what to install."""
    if has_rasterio() or not isinstance(error.__cause__, Image.DecompressionBombError):
        return error
    return DataError(
        f"{error} Larger {_FORMATS_TEXT} files are predicted window by window with rasterio: "
        f"{INSTALL_RASTERIO}."
    )


def can_be_georeferenced(path: Path) -> bool:
    """Whether a file is a TIFF or JPEG 2000 file, by its first bytes."""
    return _find_driver(path) in _GEO_DRIVERS


def read_raster_header(path: Path) -> RasterHeader | None:
    """Read the header of an image with rasterio; None if it cannot open the file."""
    import rasterio

    if _find_driver(path) is None:
        return None
    try:
        with _opened(path) as dataset:
            return RasterHeader(dataset.shape, _is_georeferenced(dataset))
    except (rasterio.errors.RasterioError, rasterio.errors.CRSError):
        return None


@contextmanager
def open_raster(path: Path, bands: Sequence[int] = ()) -> Iterator[RasterImage]:
    """Open an image file to read its windows.

    Args:
        path: A TIFF, JPEG 2000, PNG or JPEG file of any size.
        bands: The bands for red, green and blue, from 1; needed if there are more than three
            without alpha, of which the first three are used if there are four.

    Raises:
        ConfigError: rasterio is not installed, or `bands` are not three numbers from 1.
        DataError: The file cannot be read, has other bands, complex numbers, or is rotated by an
            EXIF orientation; also for a damaged part when it is read.
    """
    if not has_rasterio():
        raise ConfigError(f"{path}: rasterio is not installed: {INSTALL_RASTERIO}.")
    check_bands(bands)
    import rasterio

    if _find_driver(path) is None:
        raise DataError(
            f"{path}: cannot be read window by window; expected a {_FORMATS_TEXT} file."
        )
    with rasterio.Env(**_GDAL_OPTIONS), ExitStack() as stack:
        with _explained(path):
            dataset = stack.enter_context(_opened(path))
        _check_orientation(path, dataset)
        yield RasterImage(path, dataset, _select_bands(path, dataset, bands))


class RasterImage:
    """An open image whose windows are read on request.

    Attributes:
        path: The file.
        size_hw: Height and width in pixels.
        has_mask: Whether pixels can be invalid: equal to the nodata value, masked or transparent.
        has_more_frames: Whether further pages follow the first; reduced copies do not count.
    """

    def __init__(self, path: Path, dataset: DatasetReader, bands: Sequence[int]) -> None:
        from rasterio.enums import ColorInterp, MaskFlags

        self.path = path
        self.size_hw: tuple[int, int] = dataset.shape
        self.has_mask = any(
            MaskFlags.all_valid not in dataset.mask_flag_enums[band - 1] for band in bands
        )
        self.has_more_frames = len(dataset.subdatasets) > 1
        self._dataset = dataset
        self._bands = list(bands)
        self._has_alpha = ColorInterp.alpha in dataset.colorinterp
        self._has_palette = len(bands) == 1 and ColorInterp.palette in dataset.colorinterp

    @property
    def georeference(self) -> dict[str, Any]:
        """Coordinate system and transform, or control points, as `rasterio.open` takes them."""
        dataset = self._dataset
        points, crs = dataset.gcps
        if points:
            return {"gcps": points, "crs": crs}
        return {"crs": dataset.crs, "transform": dataset.transform}

    def read(self, rows: slice, columns: slice) -> tuple[UInt8Array, BoolArray | None]:
        """Read a window.

        Returns:
            The pixels, RGB, uint8 [rows, columns, 3], and which of them are valid, bool
            [rows, columns]; None if all pixels of the image are valid.

        Raises:
            DataError: The file is damaged, or has values that are not finite.
        """
        values, opacity = self._read_values(rows, columns)
        if self._has_palette:
            rgb = self._palette[values[0]]
        else:
            gray_or_rgb = self._to_bytes(values, opacity)
            rgb = np.empty((*gray_or_rgb.shape[1:], _NUM_COLORS), np.uint8)
            rgb[...] = gray_or_rgb.transpose(1, 2, 0)
        if opacity is None:
            return rgb, None
        return self._blend(rgb, opacity) if self._has_alpha else rgb, opacity > 0

    def _read_values(
        self, rows: slice, columns: slice
    ) -> tuple[npt.NDArray[Any], UInt8Array | None]:
        """Read the stored values [bands, h, w], and the mask or alpha uint8 [h, w], if any."""
        from rasterio.windows import Window

        size = columns.stop - columns.start, rows.stop - rows.start
        window = Window(columns.start, rows.start, *size)
        with _explained(self.path):
            values = self._dataset.read(self._bands, window=window)
            return values, self._dataset.dataset_mask(window=window) if self.has_mask else None

    def _to_bytes(self, values: npt.NDArray[Any], opacity: UInt8Array | None) -> UInt8Array:
        if values.dtype == np.uint8:
            return values
        low, high = self._value_range
        if opacity is not None:  # nodata can be any value, such as -9999 or NaN
            values = np.where(opacity > 0, values, np.array(low, values.dtype))
        return scale_to_bytes(values, low, high, self.path)

    @staticmethod
    def _blend(rgb: UInt8Array, opacity: UInt8Array) -> UInt8Array:
        """Blend transparent pixels with white."""
        if opacity.min() == 255:
            return rgb
        alpha = opacity[..., None].astype(np.uint16)
        return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)

    @cached_property
    def _palette(self) -> UInt8Array:
        """The color of each value, uint8 [65536, 3]."""
        colors = np.zeros((1 << 16, _NUM_COLORS), np.uint8)
        for value, color in self._dataset.colormap(1).items():
            colors[value] = color[:_NUM_COLORS]
        return colors

    @cached_property
    def _value_range(self) -> tuple[float, float]:
        """The smallest and greatest valid value of the bands; reads the whole image."""
        height, width = self.size_hw
        found: list[float] = []
        for top in range(0, height, READ_ROWS):
            rows = slice(top, min(top + READ_ROWS, height))
            values, opacity = self._read_values(rows, slice(0, width))
            if opacity is not None:
                values = values[:, opacity > 0]
            if values.size:
                found = [*found, float(values.min()), float(values.max())]
                found = [float(np.min(found)), float(np.max(found))]  # NaN stays
        return (found[0], found[1]) if found else (0.0, 0.0)


def _find_driver(path: Path) -> str | None:
    try:
        with open_regular_file(path) as file:
            head = file.read(max(map(len, _DRIVERS)))
    except OSError:
        return None
    if is_raw_file(path):
        return None
    return next((driver for magic, driver in _DRIVERS.items() if head.startswith(magic)), None)


@contextmanager
def _opened(path: Path) -> Iterator[DatasetReader]:
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        # An absolute path, because rasterio takes "zip:x.tif" for an archive.
        dataset = rasterio.open(path.absolute(), driver=_find_driver(path))
    with dataset:
        yield dataset


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Convert rasterio's errors to a DataError with the file name."""
    import rasterio

    try:
        yield
    except rasterio.errors.RasterioError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(
            f"{path}: cannot be decoded; the file is damaged or truncated ({reason})."
        ) from error


def _is_georeferenced(dataset: DatasetReader) -> bool:
    has_position = dataset.crs is not None or not dataset.transform.is_identity
    return has_position or bool(dataset.gcps[0])


def _check_orientation(path: Path, dataset: DatasetReader) -> None:
    if _is_georeferenced(dataset):
        return  # the transform refers to the stored rows
    orientation = int(dataset.tags().get("EXIF_Orientation", 1))
    if dataset.driver == "GTiff":
        orientation = tiff_orientation(path)
    if orientation != 1:
        raise DataError(
            f"{path}: has the EXIF orientation {orientation}, which is not supported for images "
            "that are read window by window. Rotate the image, and save it without this entry."
        )


def _select_bands(path: Path, dataset: DatasetReader, bands: Sequence[int]) -> tuple[int, ...]:
    """Return the bands to read: one (gray or palette) or three."""
    from rasterio.enums import ColorInterp

    count = dataset.count
    if bands and max(bands) > count:
        raise DataError(
            f"{path}: has {count} {'band' if count == 1 else 'bands'}; --bands "
            f"{','.join(map(str, bands))} needs band {max(bands)}."
        )
    if any(kind.startswith("complex") for kind in dataset.dtypes):
        raise DataError(f"{path}: has complex numbers; expected integers or floats.")
    if bands:
        return tuple(bands)
    if count - (ColorInterp.alpha in dataset.colorinterp) == 1:
        return (1,)
    if count in (_NUM_COLORS, _NUM_COLORS + 1):
        return (1, 2, 3)
    raise DataError(
        f"{path}: has {count} bands; choose those for red, green and blue, such as --bands 3,2,1."
    )
