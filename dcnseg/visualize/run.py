"""Offset figures for many files; entry point `visualize_files`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import IGNORE_INDEX, ClassMap
from dcnseg.data.image_io import read_size
from dcnseg.errors import ConfigError, DataError, DcnsegError, NotFiniteError, short_repr
from dcnseg.files import has_unmarked_files, mark_output_folder
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.regions import Region
from dcnseg.inference.results import describe_error
from dcnseg.visualize.figures.summary import NetworkView
from dcnseg.visualize.offsets import capture_offsets, limit_size
from dcnseg.visualize.points import NamedPoint, check_points, choose_points
from dcnseg.visualize.region_bins import (
    choose_regions,
    compute_region_bins,
    has_region_offsets,
)
from dcnseg.visualize.report import visualize_image

SUFFIXES: Final = {"png": (".png",), "svg": (".svg",), "both": (".png", ".svg")}
MAX_FRAMES: Final = 600


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
    compare: Path | None = None,
    region_classes: Sequence[str] = (),
    figure_format: str = "png",
    frames: int = 0,
    device: str = "auto",
    on_note: Callable[[str], None] | None = None,
) -> Iterator[OffsetReport]:
    """Draw the offsets of each image; an unreadable image does not stop the others.

    Args:
        run: Run folder or weights file.
        images: Images and the names of their outputs.
        out: Output folder.
        points: Points (x, y) in image pixels; if empty, those of `choose_points`.
        compare: Run folder or weights file of a network to draw beside, with the same points.
        region_classes: Names of the classes whose regions are drawn if the network has a region
            head with offsets; if empty, all.
        figure_format: "png", "svg" or "both".
        frames: Number of frames of an animation of a moving point, at most 600; 0 for none.
        device: As `Predictor.from_checkpoint`.
        on_note: Called with a message if `region_classes` are given and there is nothing to draw.

    Yields:
        The result of each image, after its files are written.

    Raises:
        ConfigError: The network has no offsets, or no deformable layer for `points`; a point is
            outside an image; the format or the number of frames is unknown; `region_classes` are
            given and the network has no region head, or has no such class; or `out` has files that
            dcnseg did not write.
        CheckpointError: The weights cannot be loaded.
    """
    if figure_format not in SUFFIXES:
        raise ConfigError(
            f"--format is {short_repr(figure_format)}; expected {', '.join(SUFFIXES)}."
        )
    if not 0 <= frames <= MAX_FRAMES:
        raise ConfigError(f"--frames is {frames}; expected 1 to {MAX_FRAMES}.")
    predictor = Predictor.from_checkpoint(run, device=device)
    other = None if compare is None else Predictor.from_checkpoint(compare, device=device)
    note = on_note or (lambda _: None)
    classes = _select_region_classes(predictor, run, region_classes, note)
    has_layers = bool(predictor.model.deformable_layers())
    if not has_layers and (points or classes is None):
        raise ConfigError(
            f"{run} is a plain network without deformable layers. Train with, for example, "
            "--deform-layers 3."
        )
    check_points_in_images(points, images)
    if has_unmarked_files(out):
        raise ConfigError(
            f"--out is {out}, which contains files and is not marked as dcnseg output. Use another "
            "--out, or delete the folder if it contains only old outputs."
        )
    for image in images:
        try:
            pixels = image.read()
            mark_output_folder(out)
            view, regions = view_image(predictor, pixels, _name_run(run), classes is not None)
            views = [view]
            if other is not None and compare is not None:
                views.append(view_image(other, pixels, _name_run(compare))[0])
            chosen = [NamedPoint(xy) for xy in dict.fromkeys(points)]
            if not chosen and view.layers:
                chosen = choose_points(view.labels, view.class_map)
            bins = None
            if classes is not None:
                drawn = choose_regions(regions, classes)
                bins = compute_region_bins(predictor, pixels, drawn)
            if bins is not None and not bins and region_classes:
                note(f"{image.path}: no region of {', '.join(region_classes)} is predicted.")
            paths = visualize_image(
                pixels,
                views,
                chosen,
                out / image.name.parent,
                image.name.name,
                regions=bins,
                suffixes=SUFFIXES[figure_format],
                frames=frames,
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


def view_image(
    predictor: Predictor, image: npt.NDArray[np.uint8], name: str, has_regions: bool = False
) -> tuple[NetworkView, Sequence[Region]]:
    """Predict an image, and capture the offsets; the regions are empty unless requested."""
    labels = np.full(image.shape[:2], IGNORE_INDEX, np.uint8)
    regions: Sequence[Region] = ()
    with suppress(NotFiniteError):  # the offsets may still tell why
        prediction = predictor.predict(image, regions=has_regions)
        labels, regions = prediction.labels, prediction.regions or ()
    layers = []
    if predictor.model.deformable_layers():
        network_input = limit_size(predictor.prepare(image))
        layers = capture_offsets(predictor.model, network_input, image.shape[:2])
    return NetworkView(name, layers, labels, predictor.class_map), regions


def _name_run(path: Path) -> str:
    """The name of a run folder or weights file in titles."""
    return path.resolve().stem if path.is_file() else path.resolve().name


def check_points_in_images(
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
