"""Offset figures for many files; entry point `visualize_files`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import ClassMap
from dcnseg.data.image_io import read_size
from dcnseg.errors import ConfigError, DataError, DcnsegError, short_repr
from dcnseg.files import has_unmarked_files, mark_output_folder
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.results import describe_error
from dcnseg.visualize.offsets import limit_size
from dcnseg.visualize.region_bins import (
    RegionBins,
    choose_regions,
    compute_region_bins,
    has_region_offsets,
)
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
    region_classes: Sequence[str] = (),
    device: str = "auto",
    on_note: Callable[[str], None] | None = None,
) -> Iterator[OffsetReport]:
    """Draw the offsets of each image; an unreadable image does not stop the others.

    Args:
        run: Run folder or weights file.
        images: Images and the names of their outputs.
        out: Output folder.
        points: Points (x, y) in image pixels; if empty, a 3x3 grid.
        region_classes: Names of the classes whose regions are drawn if the network has a region
            head with offsets; if empty, all.
        device: As `Predictor.from_checkpoint`.
        on_note: Called with a message if `region_classes` are given and there is nothing to draw.

    Yields:
        The result of each image, after its files are written.

    Raises:
        ConfigError: The network has no offsets, or no deformable layer for `points`; a point is
            outside an image; `region_classes` are given and the network has no region head, or has
            no such class; or `out` has files that dcnseg did not write.
        CheckpointError: The weights cannot be loaded.
    """
    predictor = Predictor.from_checkpoint(run, device=device)
    note = on_note or (lambda _: None)
    classes = _select_region_classes(predictor, run, region_classes, note)
    has_layers = bool(predictor.model.deformable_layers())
    if not has_layers and (points or classes is None):
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
            default = make_default_points((height, width)) if has_layers else []
            bins = None if classes is None else _find_region_bins(predictor, pixels, classes)
            if bins is not None and not bins and region_classes:
                note(f"{image.path}: no region of {', '.join(region_classes)} is predicted.")
            paths = visualize_image(
                predictor.model,
                limit_size(predictor.prepare(pixels)),
                pixels,
                list(dict.fromkeys(points or default)),
                out / image.name.parent,
                image.name.name,
                regions=None if bins is None else (bins, predictor.class_map),
            )
        except (DcnsegError, MemoryError) as error:
            yield OffsetReport(image, (), describe_error(image, error))
        else:
            yield OffsetReport(image, tuple(paths))


def _select_region_classes(
    predictor: Predictor, run: Path, names: Sequence[str], note: Callable[[str], None]
) -> Sequence[int] | None:
    """Return the training indices of the classes whose regions are drawn; None draws no figure."""
    head = predictor.model.region_head
    if head is None:
        if names:
            raise ConfigError(
                f"--regions needs a network with a region head, but {run} has none. Train with, "
                "for example, --region-head deformable-rfcn."
            )
        return None
    if names:
        indices = _find_classes(predictor.class_map, names)
        if not has_region_offsets(head):
            note(f"The region head of {run} ({head.pooling}) has no offsets; no region is drawn.")
    else:
        indices = list(predictor.class_map.object_indices)
    return indices if has_region_offsets(head) else None


def _find_classes(class_map: ClassMap, names: Sequence[str]) -> list[int]:
    known = {class_map.names[index]: index for index in class_map.object_indices}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--regions has the class {short_repr(name)}; expected one or several of "
                f"{', '.join(known) or 'no class, because there is only background'}."
            )
    return [known[name] for name in names]


def _find_region_bins(
    predictor: Predictor, image: npt.NDArray[np.uint8], classes: Sequence[int]
) -> list[RegionBins]:
    """Predict the regions of an image, and compute the bins of those to draw."""
    regions = predictor.predict(image, regions=True).regions
    return compute_region_bins(predictor, image, choose_regions(regions or (), classes))


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
