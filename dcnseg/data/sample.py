"""An image with its mask: `Sample`, and how their names are compared."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """An image and its mask (or the JSON file with its polygons).

    `stem` is their common relative path without the extension, such as "sub/a".
    """

    image: Path
    mask: Path
    stem: str


@dataclass(frozen=True)
class FileProblem:
    """A problem in an annotation file that covers many images, in one sentence."""

    path: Path
    what: str


def to_nfc(text: str) -> str:
    """Return `text` in NFC: file systems store "ü" either as one character or as two."""
    return unicodedata.normalize("NFC", text)
