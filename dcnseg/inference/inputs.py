"""Which images a command's arguments mean; entry point `find_inputs`."""

from __future__ import annotations

import glob
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.image_file import UNSUPPORTED_KINDS
from dcnseg.data.image_io import read_image
from dcnseg.data.pairing.listing import (
    NOT_REGULAR,
    UNREADABLE,
    find_files,
    find_images,
    find_unsupported,
)
from dcnseg.errors import ConfigError, DataError

STDIN = "-"
_URL: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_IMAGES_AND_MASKS = (
    ("images", "masks"),
    ("image", "label"),
    ("imgs", "annotations"),
    ("JPEGImages", "SegmentationClass"),
    ("JPEGImages", "SegmentationObject"),
    ("leftImg8bit", "gtFine"),
)


@dataclass(frozen=True)
class InputImage:
    """An image to work on, and the name of what is made from it.

    Attributes:
        path: The file.
        name: Below a given folder, or the fixed part of a pattern, the folders are kept. Without
            the suffix, unless two images differ in it alone.
        problem: Why it cannot be read, as far as that is known already.
    """

    path: Path
    name: PurePath
    problem: str = ""

    def __str__(self) -> str:
        """The path, for messages."""
        return str(self.path)

    def read(self) -> npt.NDArray[np.uint8]:
        """The image as `read_image` returns it.

        Raises:
            DataError: As `read_image`, or it has a problem.
        """
        if self.problem:
            raise DataError(self.problem)
        return read_image(self.path)


def find_inputs(
    arguments: Sequence[str],
    stdin: Iterable[str] | None = (),
    *,
    outputs: Sequence[Path] = (),
    on_note: Callable[[str], None] | None = None,
) -> list[InputImage]:
    """Expand files, folders (recursively), glob patterns and "-" (a list on stdin).

    The list has an image per line, or per NUL as `find -print0` writes it. A file that is named
    but missing is kept, so that it is reported beside the others' results; so is a URL, and of
    several arguments one for which nothing is found. Of a data folder that holds images and their
    masks in two folders, the masks are left out.

    Args:
        arguments: What to expand.
        stdin: Lines of the list; None where stdin is closed.
        outputs: Folders that will be written to; files below them are left out.
        on_note: Told what is left out.

    Raises:
        ConfigError: two images would write the same output.
        DataError: nothing was found for the only argument.
    """
    found: dict[str, tuple[InputImage, PurePath]] = {}  # by the file, however it was spelled
    left_out = _OutputFilter([os.path.realpath(folder) for folder in outputs])
    named_files = list(_with_stdin(arguments, stdin))
    for argument in named_files:
        try:
            expanded = _expand(argument, left_out, on_note)
        except DataError as error:
            if len(named_files) == 1:
                raise
            expanded = [_rejected(argument, str(error))]  # the others are worked on
        for image in expanded:
            found.setdefault(image.problem or os.path.realpath(image.path), (image, image.name))
    left_out.report(on_note)
    if not found:
        raise DataError(f"{', '.join(arguments)}: no images but those in the output folder.")
    named = _with_unique_names(list(found.values()))
    sharing = Counter(full_name.with_suffix("") for _, full_name in named)
    images: dict[PurePath, InputImage] = {}
    for image, full_name in named:
        stem = full_name.with_suffix("")
        name = full_name if sharing[stem] > 1 else stem
        other = images.setdefault(name, InputImage(image.path, name, image.problem))
        if other.path != image.path:
            raise ConfigError(
                f"{other} and {image} would both be written as {name}. "
                "Rename one, or call once for each of them."
            )
    return list(images.values())


class _OutputFilter:
    """Leaves out what lies in the output folders, and remembers it for one note."""

    def __init__(self, folders: Sequence[str]) -> None:
        self._folders = folders
        self._paths: list[Path] = []

    def without_outputs(self, files: Sequence[Path]) -> list[Path]:
        """The files that do not lie in an output folder."""
        if not self._folders:
            return list(files)
        kept: list[Path] = []
        for file in files:
            parents = {str(parent) for parent in Path(os.path.realpath(file)).parents}
            (self._paths if parents.intersection(self._folders) else kept).append(file)
        return kept

    def report(self, on_note: Callable[[str], None] | None) -> None:
        """Tell how many files were left out."""
        if self._paths and on_note:
            count = len(self._paths)
            on_note(
                f"{count} {'file' if count == 1 else 'files'} in the output folder "
                f"{'is' if count == 1 else 'are'} not taken as input, {self._paths[0]} for one."
            )


def _with_unique_names(
    named: list[tuple[InputImage, PurePath]],
) -> list[tuple[InputImage, PurePath]]:
    """Where two names are the same, all are named from the folder that the files have in common."""
    if len({full_name for _, full_name in named}) == len(named):
        return named
    common = os.path.commonpath([image.path.absolute().parent for image, _ in named])
    return [(image, image.path.absolute().relative_to(common)) for image, _ in named]


def _with_stdin(arguments: Sequence[str], stdin: Iterable[str] | None) -> Iterator[str]:
    for argument in arguments:
        if argument != STDIN:
            yield argument
            continue
        if isinstance(stdin, io.TextIOWrapper):  # a name may hold any bytes
            stdin.reconfigure(errors="surrogateescape")
        listed = [
            part.strip("\ufeff \t\r") for line in stdin or () for part in re.split("[\n\0]", line)
        ]
        if not any(listed):
            raise DataError("-: no images were listed on stdin.")
        yield from filter(None, listed)


def _expand(
    argument: str, left_out: _OutputFilter, on_note: Callable[[str], None] | None
) -> list[InputImage]:
    path = Path(argument)
    # os.path's functions, because pathlib's raise an error for a name that is too long.
    if os.path.isdir(path):  # noqa: PTH112
        return _expand_folder(path, left_out, on_note)
    if os.path.lexists(path):
        return _in_folder(left_out.without_outputs([path]), path.parent)
    if _URL.match(argument):
        return [_rejected(argument, f"{argument}: URLs are not read; download the image first.")]
    if glob.has_magic(argument):
        # pathlib's glob takes no absolute pattern
        matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
        files = [Path(match) for match in matches if not os.path.isdir(match)]  # noqa: PTH112
        if not files:
            raise DataError(f"{argument}: no file matches this pattern.")
        return _in_folder(left_out.without_outputs(files), _fixed_part(path))
    return [InputImage(path, PurePath(path.name))]


def _rejected(argument: str, problem: str) -> InputImage:
    path = Path(argument)
    return InputImage(path, PurePath(path.name), problem)


def _in_folder(files: Iterable[Path], folder: Path) -> list[InputImage]:
    return [InputImage(file, file.relative_to(folder)) for file in files]


def _expand_folder(
    folder: Path, left_out: _OutputFilter, on_note: Callable[[str], None] | None
) -> list[InputImage]:
    listed = find_images(folder)
    files = _without_masks(folder, left_out.without_outputs(listed), on_note)
    unread = _describe_unsupported(folder)
    if not files:
        rest = f"; it has {unread}, which are not read" if unread else ""
        own = " but those in the output folder" if listed else ""
        raise DataError(f"{folder}: no images in this folder{own}{rest}.")
    if unread and on_note:
        on_note(f"{folder} has {unread}, which are not read; they are skipped.")
    for path, reason in find_unsupported(folder).items():
        if reason.startswith((NOT_REGULAR, UNREADABLE)) and on_note:
            on_note(f"{path} is {reason}; it is skipped.")
    return _in_folder(files, folder)


def _describe_unsupported(folder: Path) -> str:
    """The files that show something to people and are not read: "2 .heic and 1 .mp4 files"."""
    counts = Counter(path.suffix.lower() for path in find_files(folder, UNSUPPORTED_KINDS))
    parts = [f"{count} {suffix}" for suffix, count in sorted(counts.items())]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{text} {'file' if counts.total() == 1 else 'files'}" if parts else ""


def _without_masks(
    folder: Path, files: list[Path], on_note: Callable[[str], None] | None
) -> list[Path]:
    """Leave out the files of folders like masks/ that stand beside one like images/."""
    folders = {parent for file in files for parent in file.relative_to(folder).parents}
    masks = {
        parent / theirs
        for parent in folders
        for images, theirs in _IMAGES_AND_MASKS
        if parent / images in folders and parent / theirs in folders
    }
    kept = [file for file in files if masks.isdisjoint(file.relative_to(folder).parents)]
    if masks and on_note:
        names = ", ".join(str(folder / mask) for mask in sorted(masks))
        on_note(
            f"{folder} is a data folder: its {len(kept)} images are taken, and the "
            f"{len(files) - len(kept)} masks in {names} are left out."
        )
    return kept


def _fixed_part(pattern: Path) -> Path:
    """The folder before the first part of a pattern that has a wildcard."""
    fixed = Path()
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed
