"""Finds files by patterns with {split} and {stem}; the entry point is `match_patterns`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Final

from dcnseg.data.image_file import IMAGE_SUFFIXES
from dcnseg.data.pairing.listing import find_files
from dcnseg.data.pairing.splits import SPLIT_WORDS, Entry, Found
from dcnseg.data.sample import to_nfc
from dcnseg.errors import ConfigError, DataError, short_repr

_TOKENS: Final = re.compile(r"\{stem\}|\{split\}|\*\*/|\*\*|\*|\?|\[[^\]/]+\]|[^*?\[{]+|.")
_SPLITS: Final = "|".join(sorted(SPLIT_WORDS, key=len, reverse=True))
_ANY_ENDING: Final = r"\.[^./]+"


def match_patterns(root: Path, images: str, masks: str) -> Found:
    """Find the files that match the patterns; equal {split} and {stem} make a pair.

    {split} is train, val, test or a synonym; {stem} is any text, including folders. `*`, `**`, `?`
    and `[abc]` match as in a shell and do not affect pairing. The extension may be missing, `.*`,
    or in another case. A pattern without {split} covers every split of the other pattern.

    Args:
        root: The folder of relative patterns.
        images: Where the images are, such as "{split}/images/{stem}.jpg".
        masks: Where the masks or LabelMe files are, such as "{split}/labels/{stem}_L.png".

    Raises:
        DataError: One of the patterns matches nothing.
        ConfigError: The brackets of a pattern are not a valid set of characters.
    """
    image_entries = _matches(root, images, IMAGE_SUFFIXES)
    mask_entries = _matches(root, masks, IMAGE_SUFFIXES | {".json"})
    if to_nfc(images) != to_nfc(masks):
        # In one folder, {stem}.jpg also matches a_mask.jpg, which the other pattern matches too.
        image_entries, mask_entries = _without_common(images, image_entries, masks, mask_entries)
    for option, pattern, entries in (
        ("--images", images, image_entries),
        ("--masks", masks, mask_entries),
    ):
        if not entries:
            raise DataError(
                f"{option} '{pattern}' matches no file below {_divide(root, pattern)[0]}. {{stem}} "
                "is the common part of the names, {split} is train, val or test."
            )
    if "{split}" in masks and "{split}" not in images:
        image_entries = _in_splits_of(mask_entries, image_entries)
    if "{split}" in images and "{split}" not in masks:
        mask_entries = _in_splits_of(image_entries, mask_entries)
    return Found(
        image_entries,
        mask_entries,
        f"images {images}, masks {masks}",
        "{stem} (and {split}) must match the same text in both patterns.",
    )


def _matches(root: Path, pattern: str, suffixes: frozenset[str]) -> list[Entry]:
    start, rest = _divide(root, pattern)
    try:
        expression = re.compile(_expression(rest))
    except re.error as error:  # "[z-a]"
        raise ConfigError(
            f"the pattern {short_repr(pattern)} is not valid ({error}); expected characters or "
            "ranges of characters in brackets, such as [a-z]."
        ) from error
    found = []
    for path in find_files(start, suffixes) if start.is_dir() else []:
        match = expression.fullmatch(to_nfc(path.relative_to(start).as_posix()))
        if match:
            groups = match.groupdict()
            split = SPLIT_WORDS[groups["split"].lower()] if groups.get("split") else ""
            found.append(Entry(path, split, groups["stem"]))
    return found


def _without_common(
    images: str, image_entries: list[Entry], masks: str, mask_entries: list[Entry]
) -> tuple[list[Entry], list[Entry]]:
    """Assign files that both patterns match to the longer pattern."""
    common = {entry.path for entry in image_entries} & {entry.path for entry in mask_entries}
    if len(images) > len(masks):
        return image_entries, [entry for entry in mask_entries if entry.path not in common]
    return [entry for entry in image_entries if entry.path not in common], mask_entries


def _in_splits_of(others: Sequence[Entry], entries: Sequence[Entry]) -> list[Entry]:
    """Copy entries without a split into each split in which the other side has their stem."""
    splits_of: dict[str, list[str]] = {}
    for other in others:
        splits_of.setdefault(other.stem, []).append(other.split)
    return [
        replace(entry, split=split)
        for entry in entries
        # An unpaired file belongs to no split; with any split it is counted.
        for split in dict.fromkeys(splits_of.get(entry.stem, ["train"]))
    ]


def _divide(root: Path, pattern: str) -> tuple[Path, str]:
    """Return the folder before the first placeholder or wildcard, and the rest of a pattern."""
    parts = pattern.split("/")
    fixed = list(takewhile(lambda part: not re.search(r"[*?\[{]", part), parts[:-1]))
    folder = "/".join(fixed) or ("/" if pattern.startswith("/") else ".")
    return root / folder, "/".join(parts[len(fixed) :])


def _expression(pattern: str) -> str:
    """Return the regular expression of a pattern; names are in NFC."""
    pattern = to_nfc(pattern)
    extension = PurePosixPath(pattern).suffix
    has_extension = bool(extension) and not re.search(r"[{/]", extension)
    body = pattern.removesuffix(extension) if has_extension else pattern
    seen: set[str] = set()
    parts = [_part(token, seen) for token in _TOKENS.findall(body)]
    if not has_extension or extension == ".*":
        return "".join(parts) + _ANY_ENDING
    parts += ["(?i:", *(_part(token, seen) for token in _TOKENS.findall(extension)), ")"]
    return "".join(parts)


def _part(token: str, seen: set[str]) -> str:
    if token in ("{stem}", "{split}"):
        name = token[1:-1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return "(?P<stem>.+)" if name == "stem" else f"(?P<split>(?i:{_SPLITS}))"
    if token.startswith("**"):
        return "(?:.*/)?" if token.endswith("/") else ".*"
    if token in ("*", "?"):
        return "[^/]*" if token == "*" else "[^/]"
    if token.startswith("[") and token.endswith("]") and len(token) > 2:
        inner = token[1:-1].replace("\\", "\\\\")
        return f"[{'^' + inner[1:] if inner.startswith('!') else inner}]"
    return re.escape(token)
