"""Files and folders at URLs that fsspec can open, such as s3://; entry point `to_path`.

The functions `has_content`, `is_marked`, `has_unmarked_content` and `mark` also take local folders.
"""

from __future__ import annotations

import glob
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePath, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

from dcnseg.errors import ConfigError, DataError
from dcnseg.files import (
    MARKER_TEXT,
    OUTPUT_MARKER,
    has_unmarked_files,
    is_output_folder,
    mark_output_folder,
)

_URL: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# Here, a put makes a file visible when it is complete. Elsewhere a file is renamed after writing.
_ATOMIC_PUT: Final = frozenset(
    {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory"}
)


def is_url(text: str) -> bool:
    """Whether a text is a URL."""
    return bool(_URL.match(text))


@dataclass(frozen=True)
class UrlPath:
    """A file or folder at a URL, with the part of pathlib's interface that prediction needs.

    Nothing is cached, because other processes write to the same folders.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str | PurePath) -> UrlPath:
        text = name.as_posix() if isinstance(name, PurePath) else name
        return UrlPath(f"{self.url.rstrip('/')}/{text}")

    @property
    def name(self) -> str:
        """The last part, without the query of a web address."""
        return PurePosixPath(urlsplit(self.url).path if self.is_web else self.url).name

    @property
    def is_web(self) -> bool:
        """Whether this is a web address, which names one file."""
        return self.url.startswith("http")

    def relative_to(self, folder: UrlPath) -> PurePosixPath:
        """Return the path relative to a folder; raises a ValueError if it is not below it."""
        return PurePosixPath(self.url).relative_to(PurePosixPath(folder.url))

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        system, path = self._resolve()
        return bool(system.exists(path))

    def is_file(self) -> bool:
        """Whether there is a file."""
        system, path = self._resolve()
        return bool(system.isfile(path))

    def is_dir(self) -> bool:
        """Whether there is a folder, or on an object store, whether there is a file below."""
        system, path = self._resolve()
        return bool(system.isdir(path))

    def has_entries(self) -> bool:
        """Whether this is a folder with any content."""
        system, path = self._resolve()
        try:
            found = system.ls(path, detail=False)
        except FileNotFoundError:
            return False
        return any(str(entry).rstrip("/") != path.rstrip("/") for entry in found)

    def read_bytes(self) -> bytes:
        """Return the content of a file."""
        system, path = self._resolve()
        content: bytes = system.cat_file(path)
        return content

    def write_bytes(self, content: bytes) -> None:
        """Write a file that appears whole or not at all, as far as the file system can."""
        system, path = self._resolve()
        protocols = {system.protocol} if isinstance(system.protocol, str) else {*system.protocol}
        if protocols & _ATOMIC_PUT:
            system.pipe_file(path, content)
            return
        parent, _, name = path.rpartition("/")
        temporary = f"{parent}/.{secrets.token_hex(8)}.tmp{PurePosixPath(name).suffix}"
        system.makedirs(parent, exist_ok=True)
        try:
            system.pipe_file(temporary, content)
            system.mv(temporary, path)
        except BaseException:
            with suppress(Exception):
                system.rm_file(temporary)
            raise

    def find(self) -> list[UrlPath]:
        """Return the files in this folder and below, sorted, with hidden ones; none if missing."""
        system, path = self._resolve()
        try:
            found = system.find(path)
        except FileNotFoundError:
            return []
        return [self / file[len(path) :].lstrip("/") for file in sorted(found) if file != path]

    def split_pattern(self) -> tuple[UrlPath, str]:
        """Return the parent folders up to the first wildcard, and the rest; "" without one."""
        if self.is_web:  # has ? for a query
            return self, ""
        scheme, _, rest = self.url.partition("://")
        parts = rest.split("/")
        fixed = list(takewhile(lambda part: not glob.has_magic(part), parts))
        return UrlPath(f"{scheme}://{'/'.join(fixed)}"), "/".join(parts[len(fixed) :])

    def glob(self, pattern: str) -> list[UrlPath]:
        """Return the files that match a pattern relative to this folder, sorted."""
        system, path = self._resolve()
        found = system.glob(f"{path.rstrip('/')}/{pattern}", detail=True)
        files = sorted(file for file, info in found.items() if info["type"] == "file")
        return [self / file[len(path) :].lstrip("/") for file in files]

    def _resolve(self) -> tuple[Any, str]:
        """Return the file system and the path in it."""
        from fsspec.core import url_to_fs  # not needed for local folders

        try:
            system, path = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:  # no package for it, or an unknown protocol
            raise ConfigError(f"{self.url}: cannot be opened ({error}).") from error
        return system, str(path)


AnyPath = Path | UrlPath


def to_path(text: str) -> AnyPath:
    """Convert a path or URL; a file:// URL becomes a local path."""
    if text.lower().startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    return UrlPath(text.rstrip("/")) if is_url(text) else Path(text)


@contextmanager
def explain_url_errors(url: UrlPath) -> Iterator[None]:
    """Convert any error into a DataError: packages of file systems raise errors of many types."""
    try:
        yield
    except DataError:
        raise
    except ConfigError as error:
        raise DataError(str(error)) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{url}: cannot be read ({reason}).") from error


@contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """Yield a local file with the content of `path`; a DataError raised inside names `path`.

    Raises:
        DataError: The URL cannot be read.
    """
    if isinstance(path, Path):
        yield path
        return
    with TemporaryDirectory(prefix="dcnseg-") as folder:
        local = Path(folder, f"file{PurePosixPath(path.name).suffix}")
        with explain_url_errors(path):
            content = path.read_bytes()
        local.write_bytes(content)
        try:
            yield local
        except DataError as error:
            raise DataError(str(error).replace(str(local), str(path))) from error


@contextmanager
def local_outputs(paths: Mapping[str, AnyPath]) -> Iterator[dict[str, Path]]:
    """Yield local paths to write to; afterwards, the files are at `paths`, labels last.

    Nothing is uploaded after an exception.
    """
    local = {kind: path for kind, path in paths.items() if isinstance(path, Path)}
    if len(local) == len(paths):
        yield local
        return
    with TemporaryDirectory(prefix="dcnseg-") as folder:
        local = {
            kind: Path(folder, f"{kind}{PurePosixPath(path.name).suffix}")
            for kind, path in paths.items()
        }
        yield local
        for kind in sorted(paths, key="labels".__eq__):  # their presence marks the image as done
            target = paths[kind]
            assert isinstance(target, UrlPath)
            target.write_bytes(local[kind].read_bytes())


def has_content(folder: AnyPath) -> bool:
    """Whether a folder exists and has any content."""
    if isinstance(folder, Path):
        return folder.is_dir() and any(folder.iterdir())
    return folder.has_entries()


def is_marked(folder: AnyPath) -> bool:
    """Whether a folder is marked as written by dcnseg."""
    if isinstance(folder, Path):
        return is_output_folder(folder)
    return (folder / OUTPUT_MARKER).is_file()


def has_unmarked_content(folder: AnyPath) -> bool:
    """Whether a folder has any content and is not marked as written by dcnseg."""
    if isinstance(folder, Path):
        return has_unmarked_files(folder)
    return has_content(folder) and not is_marked(folder)  # in this order, see has_unmarked_files


def mark(folder: AnyPath) -> None:
    """Mark a folder as written by dcnseg."""
    if isinstance(folder, Path):
        mark_output_folder(folder)
    elif not is_marked(folder):
        (folder / OUTPUT_MARKER).write_bytes(MARKER_TEXT.encode())
