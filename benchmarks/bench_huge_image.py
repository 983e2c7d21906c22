"""Measure the memory and the time of the prediction of huge GeoTIFF files, window by window.

Each image is predicted in a process of its own, whose peak resident memory is shown. The network is
a DeepLabV3+ with ResNet-18 and random weights, at half of the image size as of the preset "small".
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import describe_machine, make_parser
from dcnseg.config import ModelConfig, PredictConfig, Preprocessing
from dcnseg.data.class_map import ClassMap
from dcnseg.data.raster_file import open_raster
from dcnseg.inference.huge_image import predict_raster
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import build_segmenter

SIDES = (20_000,)
QUICK_SIDES = (100,)
TILE = 512
BAR_GB = 2.5  # limit of the peak resident memory, for any number of rows
_GB = 1e9


@dataclass(frozen=True)
class Case:
    """One image and the network's settings."""

    height: int
    width: int
    num_classes: int
    window: int
    input_scale: float
    threads: int


@dataclass(frozen=True)
class Measurement:
    """What the prediction of one image took."""

    peak_gb: float
    before_gb: float  # with the network, before the image is opened
    seconds: float
    windows: int


def write_image(path: Path, height: int, width: int) -> None:
    """Write a tiled RGB GeoTIFF with a random texture, compressed with DEFLATE."""
    import rasterio
    from rasterio.windows import Window

    rng = np.random.default_rng(0)
    size = {"height": height, "width": width, "count": 3, "dtype": "uint8"}
    layout = {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate"}
    place = {"crs": "EPSG:32632", "transform": rasterio.Affine(0.2, 0, 5e5, 0, -0.2, 5e6)}
    with rasterio.open(
        path, "w", driver="GTiff", BIGTIFF="IF_SAFER", **size, **layout, **place
    ) as f:
        for top in range(0, height, TILE):
            rows = min(TILE, height - top)
            coarse = rng.integers(0, 256, (3, TILE // 8, -(-width // 8)), dtype=np.uint8)
            texture = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :rows, :width]
            f.write(texture, window=Window(0, top, width, rows))


def measure(case: Case, folder: Path) -> Measurement:
    """Predict the image in `folder`; call this in a fresh process."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    class_map = ClassMap.from_values(range(case.num_classes))
    predictor = Predictor(
        build_segmenter(ModelConfig(encoder="resnet18"), case.num_classes),
        class_map,
        Preprocessing(input_scale=case.input_scale),
        device=torch.device("cpu"),
        config=PredictConfig(window=case.window),
    )
    kinds = {"labels": "labels.tif", "confidence": "confidence.tif", "overlay": "overlay.jpg"}
    paths = {kind: folder / name for kind, name in kinds.items()}
    windows = 0

    def on_window(done: int, total: int) -> None:
        nonlocal windows
        windows = done
        if sys.stderr.isatty():
            print(f"\rwindow {done} of {total}", end="", file=sys.stderr)

    before, start = _peak_bytes(), time.perf_counter()
    with open_raster(folder / "image.tif") as raster:
        predict_raster(predictor, raster, paths, on_window=on_window)
    seconds = time.perf_counter() - start
    return Measurement(_peak_bytes() / _GB, before / _GB, seconds, windows)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sides", type=int, nargs="+", help="sides of the images in pixels")
    parser.add_argument("--width", type=int, help="width of all images; default: the side")
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--window", type=int, default=PredictConfig.window)
    parser.add_argument("--input-scale", type=float, default=0.5)
    options = parser.parse_args(arguments)
    machine = describe_machine() | {"threads": options.threads}
    if not options.json:
        print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
        print(f"peak resident memory; the limit is {BAR_GB} GB")
    rows = []
    for side in options.sides or (QUICK_SIDES if options.quick else SIDES):
        case = Case(
            side,
            options.width or side,
            options.classes,
            options.window,
            options.input_scale,
            options.threads,
        )
        with tempfile.TemporaryDirectory() as name:
            write_image(Path(name) / "image.tif", case.height, case.width)
            # Spawned, so that the peak of this process does not count.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
                found = process.submit(measure, case, Path(name)).result()
        rows.append({**asdict(case), **asdict(found)})
        if not options.json:
            print(
                f"{case.width}x{case.height}: peak {found.peak_gb:.2f} GB (before the image "
                f"{found.before_gb:.2f} GB), {found.windows} windows in {found.seconds:.0f} s",
                flush=True,
            )
    if options.json:
        print(json.dumps({"machine": machine, "bar_gb": BAR_GB, "rows": rows}))


if __name__ == "__main__":
    main()
