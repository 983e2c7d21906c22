"""Images and masks in one folder, told apart by suffix or ending; entry `part_one_folder`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from dcnseg.data.pairing.name_rules import Key, NameRule, find_name_rules
from dcnseg.data.pairing.role_words import BESIDE_WORDS, IMAGE_WORDS, MASK_WORDS
from dcnseg.data.pairing.splits import Entry

_LOSSY: Final = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".webp"})
_TAIL: Final = re.compile(r"(?<=.)(?:[_\-. ][A-Za-z]\w*|[_\-. ]?[A-Za-z]+)$")
_HEAD: Final = re.compile(r"^[A-Za-z]+[_\-. ](?=.)")


@dataclass(frozen=True)
class Parted:
    """Images and masks, the rules that pair them (more than one: ambiguous), and the pairs."""

    images: Sequence[Entry]
    masks: Sequence[Entry]
    rules: tuple[NameRule, ...]
    pairs: int


def part_one_folder(entries: Sequence[Entry]) -> Parted | None:
    """Tell masks from images: by a suffix or prefix such as _mask or _L, or .png beside .jpg.

    Returns:
        None where nothing in the names says mask.
    """
    ways = [way for way in (_part(entries, rule) for rule in _mask_affixes(entries)) if way]
    by_ending = _part_by_ending(entries)
    if by_ending:
        ways.append(by_ending)
    if not ways:
        return None
    best = max(way.pairs for way in ways)
    top = [way for way in ways if way.pairs == best]
    rules = tuple(way.rules[0] for way in top) if best else top[0].rules[:1]
    return Parted(top[0].images, top[0].masks, rules, best)


def _mask_affixes(entries: Sequence[Entry]) -> Iterator[NameRule]:
    """Return the prefixes and suffixes among the names that are words for masks."""
    affixes = Counter[tuple[str, str]]()
    for entry in entries:
        name = entry.stem.rpartition("/")[2]
        head, tail = _HEAD.search(name), _TAIL.search(name)
        if head and _is_mask_word(head.group()):
            affixes[head.group(), ""] += 1
        for text in _tails(name) if tail else ():
            affixes["", text] += 1
    for (prefix, suffix), _ in affixes.most_common(6):
        yield NameRule("", "", prefix, suffix)


def _tails(name: str) -> Iterator[str]:
    """Yield the ends of a name that say mask: "_L", "_gtFine_labelIds", "mask" of "01mask"."""
    for pattern in (r"[_\-. ][A-Za-z]\w*?$", r"[_\-. ][A-Za-z0-9]+[_\-. ][A-Za-z0-9]+$"):
        for match in re.finditer(pattern, name):
            if match.start() > 0 and _is_mask_word(match.group()):
                yield match.group()
    glued = re.search(r"(?<=[^A-Za-z_\-. ])[A-Za-z]+$", name)  # 0001mask
    if glued and _is_mask_word(glued.group()):
        yield glued.group()


def _is_mask_word(text: str) -> bool:
    words = [word.lower() for word in re.split(r"[_\-. ]+", text) if word]
    return words[-1] in MASK_WORDS or words[0] in MASK_WORDS - {"l", "y"}


def _part(entries: Sequence[Entry], mask_rule: NameRule) -> Parted | None:
    masks = [entry for entry in entries if mask_rule.mask_key(entry.key)]
    others = [entry for entry in entries if not mask_rule.mask_key(entry.key)]
    names = {entry.key for entry in others}
    images = [entry for entry in others if not _is_beside(entry, names)]
    if not masks or not images:
        return None
    stripped: list[Key] = [key for mask in masks if (key := mask_rule.mask_key(mask.key))]
    # Turned round, images have what their masks have not: "a_sat" + "a_mask".
    choice = find_name_rules(stripped, [image.key for image in images])
    own = choice.rules[0]
    prefix, suffix = own.mask_prefix, own.mask_suffix
    if (prefix or suffix) and (prefix + suffix).strip("_-. ").lower() not in IMAGE_WORDS:
        prefix = suffix = ""
    rule = NameRule(prefix, suffix, mask_rule.mask_prefix, mask_rule.mask_suffix)
    pairs = len({rule.image_key(image.key) for image in images} & set(stripped))
    return Parted(images, masks, (rule,), pairs)


def _is_beside(entry: Entry, names: set[Key]) -> bool:
    """Whether a file is a colored view or the like of another one: "a_color" of "a"."""
    match = re.search(r"[_\-. ][A-Za-z]+$", entry.stem)
    if not match or match.group()[1:].lower() not in BESIDE_WORDS:
        return False
    return (entry.split, entry.stem[: match.start()]) in names


def _part_by_ending(entries: Sequence[Entry]) -> Parted | None:
    """Take a.jpg as the image of which a.png is the mask, if every file has such a partner."""
    images = [entry for entry in entries if entry.path.suffix.lower() in _LOSSY]
    masks = [entry for entry in entries if entry.path.suffix.lower() not in _LOSSY]
    keys = [sorted(entry.key for entry in some) for some in (images, masks)]
    if not images or keys[0] != keys[1]:
        return None
    return Parted(images, masks, (NameRule(),), len(images))
