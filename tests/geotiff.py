"""GeoTIFF files for tests, written with rasterio."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

CRS: Final = "EPSG:32632"
TRANSFORM: Final = (0.5, 0.0, 500_000.0, 0.0, -0.5, 5_000_000.0)  # pixels of half a meter


def write_geotiff(path: Path, bands: np.ndarray, **profile: Any) -> Path:
    """Write bands [C, H, W]; `profile` changes the arguments of `rasterio.open`."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")
    count, height, width = bands.shape
    size = {"count": count, "height": height, "width": width, "dtype": bands.dtype}
    layout = {"crs": CRS, "transform": rasterio.Affine(*TRANSFORM), "tiled": True} | profile
    with rasterio.open(path, "w", driver="GTiff", **size, **layout) as dataset:
        dataset.write(bands)
    return path


def random_bands(count: int, height: int = 60, width: int = 70, seed: int = 0) -> np.ndarray:
    """Random squares of 7 pixels, uint8 [C, H, W]."""
    size = count, -(-height // 7), -(-width // 7)
    squares = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return squares.repeat(7, axis=1).repeat(7, axis=2)[:, :height, :width]
