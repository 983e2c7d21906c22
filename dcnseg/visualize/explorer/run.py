"""Explorer pages for many files; entry point `explore_files`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dcnseg.data.dataset import load_pair
from dcnseg.data.sample import Sample
from dcnseg.errors import ConfigError, DataError, DcnsegError
from dcnseg.files import has_unmarked_files, mark_output_folder
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.results import describe_error
from dcnseg.visualize.explorer.page import (
    GalleryEntry,
    make_thumbnail,
    write_explorer,
    write_gallery,
)
from dcnseg.visualize.explorer.payload import UInt8Array
from dcnseg.visualize.points import Point
from dcnseg.visualize.run import OffsetReport, check_points_in_images

INDEX = "index.html"


def explore_files(
    run: Path,
    images: Sequence[InputImage],
    out: Path,
    pins: Sequence[Point] = (),
    *,
    masks: Mapping[str, Sample] | None = None,
    device: str = "auto",
    on_note: Callable[[str], None] | None = None,
) -> Iterator[OffsetReport]:
    """Write an explorer page for each image; an unreadable image does not stop the others.

    Several images get a gallery, `index.html`, which is written last.

    Args:
        run: Run folder or weights file.
        images: Images and the names of their pages.
        out: Output folder.
        pins: Points (x, y) in image pixels that are pinned at the start.
        masks: The masks of some of the images, by the resolved path of the image.
        device: As `Predictor.from_checkpoint`.
        on_note: Called with a message about a mask that cannot be read; its page has no ground
            truth.

    Yields:
        The result of each image, after its page is written; the last one has the gallery, too.

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
    check_points_in_images(pins, images)
    if has_unmarked_files(out):
        raise ConfigError(
            f"--out is {out}, which contains files and is not marked as dcnseg output. Use another "
            "--out, or delete the folder if it contains only old outputs."
        )
    gallery = _choose_gallery(images)
    entries: list[GalleryEntry] = []
    for i, image in enumerate(images):
        page = out / image.name.parent / f"{image.name.name}.html"
        outputs: list[Path] = []
        problem: str | None = None
        try:
            pixels = image.read()
            mark_output_folder(out)
            labels = None
            if sample := (masks or {}).get(os.path.realpath(image.path)):
                labels = _read_labels(sample, predictor, on_note or (lambda _: None))
            title = image.name.as_posix()
            link = "../" * (len(image.name.parts) - 1) + gallery if gallery else ""
            write_explorer(
                page, predictor, pixels, labels=labels, title=title, pins=pins, gallery=link
            )
            entries.append(GalleryEntry(title, page, make_thumbnail(pixels)))
            outputs.append(page)
        except (DcnsegError, MemoryError) as error:
            problem = describe_error(image, error)
        if gallery and entries and i == len(images) - 1:
            write_gallery(out / gallery, entries, title=f"Offsets of {run.resolve().name}")
            outputs.append(out / gallery)
        yield OffsetReport(image, tuple(outputs), problem)


def _read_labels(
    sample: Sample, predictor: Predictor, note: Callable[[str], None]
) -> UInt8Array | None:
    try:
        return load_pair(sample, predictor.class_map)[1]
    except DataError as error:
        note(f"The page of {sample.image} has no ground truth: {error}")
        return None


def _choose_gallery(images: Sequence[InputImage]) -> str:
    """The file name of the gallery, which is no page's; "" for a single image."""
    is_taken = any(f"{image.name}.html" == INDEX for image in images)
    return "" if len(images) < 2 else "gallery.html" if is_taken else INDEX
