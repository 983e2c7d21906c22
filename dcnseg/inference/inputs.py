"""Expansion of a command's arguments to images; entry point `find_inputs`."""

from __future__ import annotations

import glob
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path, PurePath, PurePosixPath
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dcnseg.data.image_file import IMAGE_SUFFIXES, UNSUPPORTED_KINDS
from dcnseg.data.image_io import read_image
from dcnseg.data.pairing.listing import (
    NOT_REGULAR,
    UNREADABLE,
    find_files,
    find_images,
    find_unsupported,
)
from dcnseg.errors import ConfigError, DataError
from dcnseg.files import OUTPUT_MARKER
from dcnseg.inference.remote_files import (
    AnyPath,
    UrlPath,
    explain_url_errors,
    is_url,
    local_copy,
    to_path,
)

STDIN = "-"
_IMAGES_AND_MASKS = (
    ("images", "masks"),
    ("image", "label"),
    ("imgs", "annotations"),
    ("JPEGImages", "SegmentationClass"),
    ("JPEGImages", "SegmentationObject"),
    ("leftImg8bit", "gtFine"),
)
Files = TypeVar("Files", Path, UrlPath)


@dataclass(frozen=True)
class InputImage:
    """An input image and the name of its outputs.

    The name is the path relative to the given folder, or to the fixed part of a pattern; without
    the suffix, unless two images differ only in it.
    """

    path: Path  # of a local file
    name: PurePath
    problem: str = ""  # error message if the file is already known to be unreadable
    url: str = ""  # of a file that is not local

    def __str__(self) -> str:
        """The path or URL, for messages."""
        return self.url or str(self.path)

    @property
    def location(self) -> AnyPath:
        """The path, or the URL if it has one."""
        return UrlPath(self.url) if self.url else self.path

    def read(self) -> npt.NDArray[np.uint8]:
        """Read the image as uint8 RGB [H, W, 3].

        Raises:
            DataError: As `read_image`, or the image has a problem.
        """
        if self.problem:
            raise DataError(self.problem)
        with local_copy(self.location) as path:
            return read_image(path)


def find_inputs(
    arguments: Sequence[str],
    stdin: Iterable[str] | None = (),
    *,
    outputs: Sequence[AnyPath] = (),
    accept_urls: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> list[InputImage]:
    """Expand files, folders (recursively), glob patterns and "-" (a list on stdin).

    The list has one image per line, or per NUL as `find -print0` writes it. With `accept_urls`,
    files, folders and patterns may also be URLs that fsspec can open. Missing files and other URLs
    are kept, and so is each of several arguments that has no images, to be reported with the
    results of the others. In data folders with an image and a mask folder, masks are skipped, and
    so are all files in the folders `outputs`; `on_note` is called with a message about them. The
    lines of `stdin` are None if it is closed.

    Raises:
        ConfigError: Two images have the same output name.
        DataError: The only argument has no images.
    """
    folders = [_resolve(folder) for folder in outputs]
    search = _Search(folders, on_note or (lambda _: None), accept_urls)
    found: dict[str, tuple[InputImage, PurePath]] = {}  # by the resolved path
    expanded_arguments = list(_expand_stdin(arguments, stdin))
    for argument in expanded_arguments:
        try:
            images = search.expand(argument)
        except DataError as error:
            if len(expanded_arguments) == 1:
                raise
            images = [_make_input(argument, str(error))]
        for image in images:
            found.setdefault(image.problem or _resolve(image.location), (image, image.name))
    if search.skipped:
        count, first = len(search.skipped), search.skipped[0]
        files = "file" if count == 1 else "files"
        search.on_note(f"Skipped {count} {files} in the output folder, for example {first}.")
    if not found:
        raise DataError(f"{', '.join(arguments)}: all images are in the output folder.")
    return _assign_names(_make_names_unique(list(found.values())))


@dataclass
class _Search:
    """Expands arguments and skips the files of the output folders."""

    output_folders: Sequence[str]
    on_note: Callable[[str], None]
    accepts_urls: bool
    skipped: list[AnyPath] = field(default_factory=list)

    def expand(self, argument: str) -> list[InputImage]:
        path = to_path(argument) if self.accepts_urls else Path(argument)
        if isinstance(path, UrlPath):
            with explain_url_errors(path):
                return self._expand_url(path)
        if is_url(argument) and self.accepts_urls:  # file://
            argument = str(path)
        # os.path's functions, because pathlib's raise an error for a name that is too long.
        if os.path.isdir(path):  # noqa: PTH112
            return self._expand_folder(path)
        if os.path.lexists(path):
            return _name_below(path.parent, self._skip_outputs([path]))
        if is_url(argument):
            text = f"{argument}: URLs are not supported; download the image first."
            return [_make_input(argument, text)]
        if glob.has_magic(argument):
            # pathlib's glob does not support absolute patterns.
            matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
            files = [Path(match) for match in matches if not os.path.isdir(match)]  # noqa: PTH112
            if not files:
                raise DataError(f"{argument}: no file matches this pattern.")
            return _name_below(_get_fixed_part(path), self._skip_outputs(files))
        return [_make_input(argument)]  # a missing file: reading it raises the error

    def _expand_url(self, url: UrlPath) -> list[InputImage]:
        folder, pattern = url.split_pattern()
        if pattern:
            files = self._skip_outputs(folder.glob(pattern))
        elif not url.is_web and url.is_dir():
            files = self._skip_masks(url, self._skip_outputs(_find_url_images(url)))
        else:  # also a missing file: reading it raises the error
            return [InputImage(Path(url.name), PurePath(url.name), url=str(url))]
        if not files:
            what = "no file matches this pattern" if pattern else "no images in this folder"
            raise DataError(f"{url}: {what}.")
        return [
            InputImage(Path(file.name), file.relative_to(folder), url=str(file)) for file in files
        ]

    def _expand_folder(self, folder: Path) -> list[InputImage]:
        images = find_images(folder)
        files = self._skip_masks(folder, self._skip_outputs(images))
        unsupported = _count_unsupported(folder)
        if not files:
            outside = " outside the output folder" if images else ""
            rest = f" (not supported: {unsupported})" if unsupported else ""
            raise DataError(f"{folder}: no images in this folder{outside}{rest}.")
        if unsupported:
            self.on_note(f"{folder}: skipped {unsupported} (format not supported).")
        for path, reason in find_unsupported(folder).items():
            if reason.startswith((NOT_REGULAR, UNREADABLE)):
                self.on_note(f"Skipped {path}: {reason}.")
        return _name_below(folder, files)

    def _skip_outputs(self, files: Sequence[Files]) -> list[Files]:
        if not self.output_folders:
            return list(files)
        kept: list[Files] = []
        for file in files:
            parents = {str(parent) for parent in PurePath(_resolve(file)).parents}
            (kept if parents.isdisjoint(self.output_folders) else self.skipped).append(file)
        return kept

    def _skip_masks(self, folder: Files, files: list[Files]) -> list[Files]:
        """Skip files in folders such as masks/ that have a sibling such as images/."""
        folders = {parent for file in files for parent in file.relative_to(folder).parents}
        masks: set[PurePath] = {
            parent / mask_name
            for parent in folders
            for image_name, mask_name in _IMAGES_AND_MASKS
            if parent / image_name in folders and parent / mask_name in folders
        }
        kept = [file for file in files if masks.isdisjoint(file.relative_to(folder).parents)]
        if masks:
            names = ", ".join(str(folder / mask) for mask in sorted(masks))
            self.on_note(
                f"{folder} is a data folder: using its {len(kept)} images, and skipping "
                f"{len(files) - len(kept)} masks in {names}."
            )
        return kept


def _assign_names(named: list[tuple[InputImage, PurePath]]) -> list[InputImage]:
    """Drop the suffix of names that are unique without it; names must not repeat then."""
    counts = Counter(full_name.with_suffix("") for _, full_name in named)
    images: dict[PurePath, InputImage] = {}
    for image, full_name in named:
        stem = full_name.with_suffix("")
        name = full_name if counts[stem] > 1 else stem
        other = images.setdefault(name, replace(image, name=name))
        if other.location != image.location:
            raise ConfigError(
                f"{other} and {image} have the same output name {name}. "
                "Rename one of them, or process them in separate calls."
            )
    return list(images.values())


def _make_names_unique(
    named: list[tuple[InputImage, PurePath]],
) -> list[tuple[InputImage, PurePath]]:
    """If two names are equal, make all names relative to the common parent folder."""
    if len({full_name for _, full_name in named}) == len(named):
        return named
    places = [_place_of(image) for image, _ in named]
    common = os.path.commonpath([place.parent for place in places])
    return [
        (image, place.relative_to(common)) for (image, _), place in zip(named, places, strict=True)
    ]


def _place_of(image: InputImage) -> PurePath:
    """Return an absolute path that differs for two files; of a URL, one such as /s3:/bucket/a."""
    return PurePosixPath(f"/{image.url}") if image.url else image.path.absolute()


def _resolve(path: AnyPath) -> str:
    return os.path.realpath(path) if isinstance(path, Path) else str(PurePosixPath(str(path)))


def _find_url_images(folder: UrlPath) -> list[UrlPath]:
    """Return the images below a folder, without hidden ones and those in folders of outputs."""
    files = [(file, file.relative_to(folder)) for file in folder.find()]
    outputs = {name.parent for _, name in files if name.name == OUTPUT_MARKER}
    outputs.discard(PurePosixPath("."))  # the folder itself may be used
    return [
        file
        for file, name in files
        if name.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in name.parts)
        and outputs.isdisjoint(name.parents)
    ]


def _expand_stdin(arguments: Sequence[str], stdin: Iterable[str] | None) -> Iterator[str]:
    for argument in arguments:
        if argument != STDIN:
            yield argument
            continue
        if isinstance(stdin, io.TextIOWrapper):  # file names may be any bytes
            stdin.reconfigure(errors="surrogateescape")
        listed = [
            part.strip("\ufeff \t\r") for line in stdin or () for part in re.split("[\n\0]", line)
        ]
        if not any(listed):
            raise DataError("-: the list on stdin is empty.")
        yield from filter(None, listed)


def _make_input(argument: str, problem: str = "") -> InputImage:
    path = Path(argument)
    return InputImage(path, PurePath(path.name), problem)


def _name_below(folder: Path, files: Iterable[Path]) -> list[InputImage]:
    return [InputImage(file, file.relative_to(folder)) for file in files]


def _count_unsupported(folder: Path) -> str:
    """Count the image and video files of unsupported formats: "2 .heic and 1 .mp4 files"."""
    counts = Counter(path.suffix.lower() for path in find_files(folder, UNSUPPORTED_KINDS))
    parts = [f"{count} {suffix}" for suffix, count in sorted(counts.items())]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{text} {'file' if counts.total() == 1 else 'files'}" if parts else ""


def _get_fixed_part(pattern: Path) -> Path:
    """Return the parent folders of a pattern up to the first wildcard."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1]))
