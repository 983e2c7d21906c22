"""What the folders above a file say of it: its split, and whether it is an image or a mask.

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
    """What one folder name says; `variant` are the words that were not understood.

    `source` is the name without the word for the split, lower case: "masks" of "train_masks".
    """

    split: str = ""
    split_word: str = ""
    role: Role = ""
    variant: str = ""
    source: str = ""


@dataclass(frozen=True)
class PlacedFile:
    """A file, and what its folders say.

    Attributes:
        entry: Path, split and stem without the folders that were understood.
        role: Whether the folders are for images or for masks; empty: they do not say.
        source: The folder that says so, "masks".
        variant: What else that folder's name says, "upright" of "masks_upright".
        template: The path as a pattern with {split} and {stem}, and * for other folders.
    """

    entry: Entry
    role: Role
    source: str
    variant: str
    template: str


def place_files(root: Path, paths: Iterable[Path], *, last_role: bool = False) -> list[PlacedFile]:
    """Read the folders of each file below `root`.

    The first folder that names a split counts, and one that names a role: before others one that
    stands beside a folder of the opposite role, then one of a plain name ("masks"). With
    `last_role` the last one counts: that of "images/masks/a.png" is a mask.
    """
    relative = [path.relative_to(root) for path in paths]
    parted = _parents_of_both_roles({path.parts[:-1] for path in relative})
    return [_place(root / path, path, parted, last_role) for path in relative]


def _parents_of_both_roles(folders: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    roles: dict[tuple[str, ...], set[str]] = {}
    for parts in folders:
        for depth, part in enumerate(parts):
            role = read_folder_name(part).role
            if role:
                roles.setdefault(parts[:depth], set()).add(role)
    return {parent for parent, found in roles.items() if len(found) == 2}


def _place(path: Path, relative: Path, parted: set[tuple[str, ...]], last_role: bool) -> PlacedFile:
    parts = relative.parts[:-1]
    words = [read_folder_name(part) for part in parts]
    if last_role:
        role_at = max((i for i, word in enumerate(words) if word.role), default=-1)
    else:
        role_at = _role_position(words, parts, parted)
    split_at = next((i for i, word in enumerate(words) if word.split), -1)
    understood = {role_at, split_at}
    rest = [part for i, part in enumerate(parts) if i not in understood]
    stem = to_nfc("/".join([*rest, relative.stem]))
    word = words[role_at] if role_at >= 0 else FolderWord()
    entry = Entry(path, words[split_at].split if split_at >= 0 else "", stem)
    template = _template(parts, words, role_at, split_at, relative.suffix)
    return PlacedFile(entry, word.role, word.source, word.variant, template)


def _role_position(
    words: Sequence[FolderWord], parts: tuple[str, ...], parted: set[tuple[str, ...]]
) -> int:
    with_role = [i for i, word in enumerate(words) if word.role]
    for wanted in (
        [i for i in with_role if parts[:i] in parted],
        [i for i in with_role if not words[i].variant],
        with_role,
    ):
        if wanted:
            return wanted[0]
    return -1


def _template(
    parts: tuple[str, ...], words: Sequence[FolderWord], role_at: int, split_at: int, suffix: str
) -> str:
    last = max(role_at, split_at)
    # A part of the stem that stands before is not told from others.
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
    strange = [
        token
        for token, own in zip(others, roles, strict=True)
        if (not own and token not in FILLER_WORDS and not (split_word and token.isdigit()))
        or (role == "mask" and token == "rgb")  # "semantic_rgb" shows "semantic"
    ]
    if not role and (strange or not split_word):
        return FolderWord()  # "train_extra" is another split, if any
    split = SPLIT_WORDS.get(split_word, "")
    source = "_".join(others)
    return FolderWord(split, split_word, role, " ".join(strange), source)


def _tokens(name: str) -> list[str]:
    """Split "trainMasks", "train_masks" and "trainmasks" into words, lower case."""
    if _role(name.lower()):
        return [name.lower()]
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+", name)
    tokens: list[str] = []
    for part in map(str.lower, parts):
        glued = next(
            (
                word
                for word in sorted(SPLIT_WORDS, key=len, reverse=True)
                if part.startswith(word) and _role(part[len(word) :])
            ),
            "",
        )
        tokens += [glued, part[len(glued) :]] if glued else [part]
    return tokens


def _role(token: str) -> Role:
    return "mask" if token in MASK_FOLDER_WORDS else "image" if token in IMAGE_FOLDER_WORDS else ""
