"""Offset figures for many files; entry point `visualize_files`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcnseg.data.image_io import read_size
from dcnseg.errors import ConfigError, DataError, DcnsegError
from dcnseg.files import has_unmarked_files, mark_output_folder
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.results import describe_error
from dcnseg.visualize.offsets import limit_size
from dcnseg.visualize.report import check_points, make_default_points, visualize_image


@dataclass(frozen=True)
class OffsetReport:
    """Result of one image: the files written, or the error message."""

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
    """Draw the offsets of each image; an unreadable image does not stop the others.

    Args:
        run: Run folder or weights file.
        images: Images and the names of their outputs.
        out: Output folder.
        points: Points (x, y) in image pixels; if empty, a 3x3 grid.
        device: As `Predictor.from_checkpoint`.

    Yields:
        The result of each image, after its files are written.

    Raises:
        ConfigError: The network has no deformable layer, a point is outside an image, or `out` has
            files that dcnseg did not write.
        CheckpointError: The weights cannot be loaded.
    """
    predictor = Predictor.from_checkpoint(run, device=device)
    if not predictor.model.deformable_layers():
        raise ConfigError(
            f"{run} is a plain network without deformable layers. Train with, for example, "
            "--deform-layers 3."
        )
    _check_points_in_images(points, images)
    if has_unmarked_files(out):
        raise ConfigError(
            f"--out is {out}, which contains files and is not marked as dcnseg output. Use another "
            "--out, or delete the folder if it contains only old outputs."
        )
    for image in images:
        try:
            pixels = image.read()
            mark_output_folder(out)
            height, width = pixels.shape[:2]
            paths = visualize_image(
                predictor.model,
                limit_size(predictor.prepare(pixels)),
                pixels,
                list(dict.fromkeys(points or make_default_points((height, width)))),
                out / image.name.parent,
                image.name.name,
            )
        except (DcnsegError, MemoryError) as error:
            yield OffsetReport(image, (), describe_error(image, error))
        else:
            yield OffsetReport(image, tuple(paths))


def _check_points_in_images(
    points: Sequence[tuple[float, float]], images: Sequence[InputImage]
) -> None:
    """Raise a ConfigError for a point outside any image, before the first file is written."""
    for image in images if points else ():
        try:
            size = read_size(image.path)
        except DataError:
            continue  # reported with the image's result
        try:
            check_points(points, size)
        except ConfigError as error:
            raise ConfigError(f"{image.path}: {error}") from error
