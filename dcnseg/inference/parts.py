"""Division of the images of a call among several calls; entry point `Part.parse`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dcnseg.errors import ConfigError
from dcnseg.inference.inputs import InputImage

_PART: Final = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class Part:
    """One of `count` parts; `number` counts from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse "3/16", the third of 16 parts.

        Raises:
            ConfigError: It is not K/N with 1 <= K <= N.
        """
        match = _PART.fullmatch(text.strip())
        part = cls(*map(int, match.groups())) if match else None
        if part is None or not 1 <= part.number <= part.count:
            raise ConfigError(
                f"--part is {text!r}; expected K/N with K from 1 to N, such as 3/16 for the third "
                "of 16 parts."
            )
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def select(self, images: Sequence[InputImage]) -> list[InputImage]:
        """Return every `count`-th image, in the order of their names.

        Each image is in exactly one part, whatever the order of `images`. The numbers of images of
        two parts differ by at most one.
        """
        ordered = sorted(images, key=lambda image: image.name.as_posix())
        return ordered[self.number - 1 :: self.count]
