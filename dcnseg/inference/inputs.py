"""Which pictures a command's arguments mean; entry point `find_inputs`."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from dcnseg.data.folders import find_images
from dcnseg.errors import ConfigError, DataError

STDIN = "-"


@dataclass(frozen=True)
class InputImage:
    """A picture to work on, and the name of what is made from it.

    Attributes:
        path: The file.
        name: Without a suffix; below a given folder the folder's structure is kept.
    """

    path: Path
    name: PurePath


def find_inputs(arguments: Sequence[str], stdin: Iterable[str] = ()) -> list[InputImage]:
    """Expand files, folders (recursively), glob patterns and "-" (a list on stdin, one per line).

    A file that is named but missing is kept, so that it is reported beside the others' results.

    Raises:
        ConfigError: two pictures would write the same output.
        DataError: nothing was found for an argument.
    """
    found: dict[PurePath, Path] = {}
    for argument in _with_stdin(arguments, stdin):
        for image in _expand(argument):
            other = found.setdefault(image.name, image.path)
            if other.resolve() != image.path.resolve():
                raise ConfigError(
                    f"{other} and {image.path} would both be written as {image.name}. "
                    "Give their common folder, or use one --out per folder."
                )
    return [InputImage(path, name) for name, path in found.items()]


def _with_stdin(arguments: Sequence[str], stdin: Iterable[str]) -> Iterator[str]:
    for argument in arguments:
        if argument == STDIN:
            yield from (line.strip() for line in stdin if line.strip())
        else:
            yield argument


def _expand(argument: str) -> list[InputImage]:
    path = Path(argument)
    if path.is_dir():
        images = [
            InputImage(file, file.relative_to(path).with_suffix("")) for file in find_images(path)
        ]
        if not images:
            raise DataError(f"{path}: no pictures in this folder.")
        return images
    if not path.exists() and glob.has_magic(argument):
        # pathlib's glob takes no absolute pattern
        matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise DataError(f"{argument}: no file matches this pattern.")
        return [InputImage(file, PurePath(file.stem)) for file in files]
    return [InputImage(path, PurePath(path.stem))]
