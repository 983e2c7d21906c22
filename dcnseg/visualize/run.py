"""Offset images of many files with a trained network; entry point `visualize_files`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from dcnseg.data.image_io import read_size
from dcnseg.errors import ConfigError, DataError, DcnsegError
from dcnseg.files import has_foreign_files, mark_output_folder
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.results import describe_error
from dcnseg.visualize.report import check_points, default_points, visualize_image

MOST_NETWORK_PIXELS = 2048 * 2048


@dataclass(frozen=True)
class OffsetReport:
    """What became of one image: the files written, or why there are none."""

    image: InputImage
    outputs: tuple[Path, ...]
    error: str | None = None


def visualize_files(
    run: Path,
    images: Sequence[InputImage],
    out: Path,
    points: Sequence[tuple[float, float]] = (),
    *,
    device: str = "auto",
) -> Iterator[OffsetReport]:
    """Draw the offsets of each image; a broken image does not stop the others.

    Args:
        run: Run folder or weights file.
        images: Images and the names of their outputs.
        out: Output folder.
        points: (x, y) in pixels of the image; a small grid when empty.
        device: As `Predictor.from_checkpoint`.

    Yields:
        The result of each image, as soon as its files are complete.

    Raises:
        ConfigError: the network has no deformable layer, a point lies outside an image, or `out`
            holds files of others.
        CheckpointError: the weights cannot be loaded.
    """
    predictor = Predictor.from_checkpoint(run, device=device)
    if not predictor.model.deformable_layers():
        raise ConfigError(
            f"{run} is a plain network without deformable layers; train with --deform-layers 3."
        )
    _check_points_everywhere(points, images)
    if has_foreign_files(out):
        raise ConfigError(
            f"--out is {out}, which holds files that dcnseg did not write, or did not mark as "
            "written. Choose another folder, or delete that one if it holds earlier outputs."
        )
    for image in images:
        try:
            pixels = image.read()
            mark_output_folder(out)
            height, width = pixels.shape[:2]
            paths = visualize_image(
                predictor.model,
                _bounded(predictor.prepare(pixels)),
                pixels,
                list(dict.fromkeys(points or default_points((height, width)))),
                out / image.name.parent,
                image.name.name,
            )
        except (DcnsegError, MemoryError) as error:
            yield OffsetReport(image, (), describe_error(image, error))
        else:
            yield OffsetReport(image, tuple(paths))


def _bounded(network_input: Tensor) -> Tensor:
    """An image that is too large to go through the network at once is shown to it smaller.

    Positions stay pixels of the image, since they are worked out from both sizes.
    """
    height, width = network_input.shape[-2:]
    factor = (MOST_NETWORK_PIXELS / (height * width)) ** 0.5
    if factor >= 1:
        return network_input
    size = max(1, int(height * factor)), max(1, int(width * factor))
    return F.interpolate(network_input, size=size, mode="bilinear", antialias=True)


def _check_points_everywhere(
    points: Sequence[tuple[float, float]], images: Sequence[InputImage]
) -> None:
    """Refuse a point outside of any image before the first file is written."""
    for image in images if points else ():
        try:
            size = read_size(image.path)
        except DataError:
            continue  # a broken image is reported when its turn comes
        try:
            check_points(points, size)
        except ConfigError as error:
            raise ConfigError(f"{image.path}: {error}") from error
