"""Which pictures a command's arguments mean; entry point `find_inputs`."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from dcnseg.data.pairing.folders import find_images
from dcnseg.errors import ConfigError, DataError

STDIN = "-"
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
    """A picture to work on, and the name of what is made from it.

    Attributes:
        path: The file.
        name: Below a given folder, or the fixed part of a pattern, the folders are kept. Without
            the suffix, unless two pictures differ in it alone.
    """

    path: Path
    name: PurePath


def find_inputs(
    arguments: Sequence[str],
    stdin: Iterable[str] = (),
    *,
    on_note: Callable[[str], None] | None = None,
) -> list[InputImage]:
    """Expand files, folders (recursively), glob patterns and "-" (a list on stdin).

    The list has a picture per line, or per NUL as `find -print0` writes it. A file that is named
    but missing is kept, so that it is reported beside the others' results. Of a data folder that
    holds pictures and their masks in two folders, the masks are left out.

    Args:
        arguments: What to expand.
        stdin: Lines of the list.
        on_note: Told what is left out.

    Raises:
        ConfigError: two pictures would write the same output.
        DataError: nothing was found for an argument.
    """
    found: dict[Path, tuple[Path, PurePath]] = {}  # by the file, however it was spelled
    for argument in _with_stdin(arguments, stdin):
        for path, full_name in _expand(argument, on_note):
            found.setdefault(path.resolve(), (path, full_name))
    named = _told_apart(list(found.values()))
    sharing = Counter(full_name.with_suffix("") for _, full_name in named)
    images: dict[PurePath, InputImage] = {}
    for path, full_name in named:
        stem = full_name.with_suffix("")
        name = full_name if sharing[stem] > 1 else stem
        other = images.setdefault(name, InputImage(path, name))
        if other.path != path:
            raise ConfigError(
                f"{other.path} and {path} would both be written as {name}. "
                "Rename one, or call once for each of them."
            )
    return list(images.values())


def _told_apart(named: list[tuple[Path, PurePath]]) -> list[tuple[Path, PurePath]]:
    """Where two names are the same, all are named from the folder that the files have in common."""
    if len({full_name for _, full_name in named}) == len(named):
        return named
    common = os.path.commonpath([path.absolute().parent for path, _ in named])
    return [(path, path.absolute().relative_to(common)) for path, _ in named]


def _with_stdin(arguments: Sequence[str], stdin: Iterable[str]) -> Iterator[str]:
    for argument in arguments:
        if argument != STDIN:
            yield argument
            continue
        listed = [part.strip() for line in stdin for part in re.split("[\n\0]", line)]
        if not any(listed):
            raise DataError("-: no pictures were listed on stdin.")
        yield from filter(None, listed)


def _expand(argument: str, on_note: Callable[[str], None] | None) -> list[tuple[Path, PurePath]]:
    path = Path(argument)
    if path.is_dir():
        files = _without_masks(path, find_images(path), on_note)
        if not files:
            raise DataError(f"{path}: no pictures in this folder.")
        return [(file, file.relative_to(path)) for file in files]
    if not path.exists() and glob.has_magic(argument):
        # pathlib's glob takes no absolute pattern
        matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise DataError(f"{argument}: no file matches this pattern.")
        folder = _fixed_part(path)
        return [(file, file.relative_to(folder)) for file in files]
    return [(path, PurePath(path.name))]


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
