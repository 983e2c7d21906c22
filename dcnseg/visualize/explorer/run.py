"""Explorer pages for many files; entry point `explore_files`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from dcnseg.data.image_io import read_size
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
from dcnseg.visualize.points import Point, check_points
from dcnseg.visualize.run import OffsetReport

INDEX = "index.html"


def explore_files(
    run: Path,
    images: Sequence[InputImage],
    out: Path,
    pins: Sequence[Point] = (),
    *,
    device: str = "auto",
) -> Iterator[OffsetReport]:
    """Write an explorer page for each image; an unreadable image does not stop the others.

    Several images get a gallery, `index.html`, which is written last.

    Args:
        run: Run folder or weights file.
        images: Images and the names of their pages.
        out: Output folder.
        pins: Points (x, y) in image pixels that are pinned at the start.
        device: As `Predictor.from_checkpoint`.

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
    for image in images if pins else ():
        with suppress(DataError):  # reported with the image's result
            check_points(pins, read_size(image.path))
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
            entries.append(_write_page(page, predictor, image, pins, gallery))
            outputs.append(page)
        except (DcnsegError, MemoryError) as error:
            problem = describe_error(image, error)
        if gallery and entries and i == len(images) - 1:
            write_gallery(out / gallery, entries, title=f"Offsets of {run.resolve().name}")
            outputs.append(out / gallery)
        yield OffsetReport(image, tuple(outputs), problem)


def _write_page(
    page: Path, predictor: Predictor, image: InputImage, pins: Sequence[Point], gallery: str
) -> GalleryEntry:
    pixels = image.read()
    out = page.parents[len(image.name.parts) - 1]
    mark_output_folder(out)
    title = image.name.as_posix()
    link = "../" * (len(image.name.parts) - 1) + gallery if gallery else ""
    write_explorer(page, predictor, pixels, title=title, pins=pins, gallery=link)
    return GalleryEntry(title, page, make_thumbnail(pixels))


def _choose_gallery(images: Sequence[InputImage]) -> str:
    """The file name of the gallery, which is no page's; "" for a single image."""
    is_taken = any(f"{image.name}.html" == INDEX for image in images)
    return "" if len(images) < 2 else "gallery.html" if is_taken else INDEX
