"""Reads from the folders of a file its split, and whether it is an image or a mask.

The entry point is `place_files`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from dcnseg.data.pairing.role_words import (
    FILLER_WORDS,
    IMAGE_FOLDER_WORDS,
    MASK_FOLDER_WORDS,
    NEGATIONS,
)
from dcnseg.data.pairing.splits import SPLIT_WORDS, Entry
from dcnseg.data.sample import to_nfc

Role = Literal["", "image", "mask"]


@dataclass(frozen=True)
class FolderWord:
    """The meaning of one folder name; `variant` holds the unknown words.

    `source` is the name in lower case without the word for the split: "masks" of "train_masks".
    """

    split: str = ""
    split_word: str = ""
    role: Role = ""
    variant: str = ""
    source: str = ""


@dataclass(frozen=True)
class PlacedFile:
    """A file, and what its folders mean."""

    entry: Entry  # path, split, and stem without the folders for role and split
    role: Role  # whether the folders are for images or for masks; empty if unknown
    source: str  # name of the folder with the role, "masks"
    variant: str  # other words of that name, "upright" of "masks_upright"
    template: str  # the path as a pattern with {split} and {stem}, and * for other folders


def place_files(root: Path, paths: Iterable[Path], *, last_role: bool = False) -> list[PlacedFile]:
    """Read the folders of each file below `root`.

    The first folder that names a split counts, and one that names a role: preferably one with a
    folder of the opposite role beside it, then one with a plain name ("masks"). With `last_role`,
    the last one counts: "images/masks/a.png" is a mask.
    """
    relative = [path.relative_to(root) for path in paths]
    shared_parents = _parents_of_both_roles({path.parts[:-1] for path in relative})
    return [_place(root / path, path, shared_parents, last_role) for path in relative]


def _parents_of_both_roles(folders: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    roles: dict[tuple[str, ...], set[str]] = {}
    for parts in folders:
        for depth, part in enumerate(parts):
            role = read_folder_name(part).role
            if role:
                roles.setdefault(parts[:depth], set()).add(role)
    return {parent for parent, found in roles.items() if len(found) == 2}


def _place(
    path: Path, relative: Path, shared_parents: set[tuple[str, ...]], last_role: bool
) -> PlacedFile:
    parts = relative.parts[:-1]
    words = [read_folder_name(part) for part in parts]
    if last_role:
        role_at = max((i for i, word in enumerate(words) if word.role), default=-1)
    else:
        role_at = _role_position(words, parts, shared_parents)
    split_at = next((i for i, word in enumerate(words) if word.split), -1)
    rest = [part for i, part in enumerate(parts) if i not in (role_at, split_at)]
    stem = to_nfc("/".join([*rest, relative.stem]))
    word = words[role_at] if role_at >= 0 else FolderWord()
    entry = Entry(path, words[split_at].split if split_at >= 0 else "", stem)
    template = _template(parts, words, role_at, split_at, relative.suffix)
    return PlacedFile(entry, word.role, word.source, word.variant, template)


def _role_position(
    words: Sequence[FolderWord], parts: tuple[str, ...], shared_parents: set[tuple[str, ...]]
) -> int:
    with_role = [i for i, word in enumerate(words) if word.role]
    by_preference = [
        *(i for i in with_role if parts[:i] in shared_parents),
        *(i for i in with_role if not words[i].variant),
        *with_role,
    ]
    return next(iter(by_preference), -1)


def _template(
    parts: tuple[str, ...], words: Sequence[FolderWord], role_at: int, split_at: int, suffix: str
) -> str:
    last = max(role_at, split_at)
    # A folder before these is part of the stem, and * in the template.
    named = [part if i in (role_at, split_at) else "*" for i, part in enumerate(parts[: last + 1])]
    if split_at >= 0:
        word = words[split_at].split_word
        named[split_at] = re.sub(word, "{split}", named[split_at], count=1, flags=re.IGNORECASE)
    return "/".join([*named, "{stem}" + suffix.lower()])


@lru_cache(maxsize=65536)
def read_folder_name(name: str) -> FolderWord:
    """Read a folder name such as "train_masks", "JPEGImages" or "valannot"."""
    tokens = _tokens(name)
    split_words = [token for token in tokens if token in SPLIT_WORDS]
    split_word = split_words[0] if len(split_words) == 1 else ""
    others = [token for token in tokens if token != split_word]
    if NEGATIONS & set(others):
        return FolderWord()
    roles = [_role(token) for token in others]
    role: Role = "mask" if "mask" in roles else "image" if "image" in roles else ""
    unknown = [
        token
        for token, own in zip(others, roles, strict=True)
        if (not own and token not in FILLER_WORDS and not (split_word and token.isdigit()))
        or (role == "mask" and token == "rgb")  # "semantic_rgb" is a view of "semantic"
    ]
    if not role and (unknown or not split_word):
        return FolderWord()  # "train_extra" is another split, if any
    split = SPLIT_WORDS.get(split_word, "")
    return FolderWord(split, split_word, role, " ".join(unknown), "_".join(others))


def _tokens(name: str) -> list[str]:
    """Split "trainMasks", "train_masks" and "trainmasks" into words, lower case."""
    if _role(name.lower()):
        return [name.lower()]
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+", name)
    words = sorted(SPLIT_WORDS, key=len, reverse=True)
    tokens: list[str] = []
    for part in map(str.lower, parts):
        joined = (word for word in words if part.startswith(word) and _role(part[len(word) :]))
        first = next(joined, "")
        tokens += [first, part[len(first) :]] if first else [part]
    return tokens


def _role(token: str) -> Role:
    return "mask" if token in MASK_FOLDER_WORDS else "image" if token in IMAGE_FOLDER_WORDS else ""
