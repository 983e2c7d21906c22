"""Finds the affixes in which image and mask names differ; entry point `find_name_rules`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import astuple, dataclass
from itertools import combinations
from typing import Final

from dcnseg.data.pairing.role_words import BESIDE_WORDS, IMAGE_WORDS, MASK_WORDS

Key = tuple[str, str]  # split, and path without ending: ("train", "street/0001_L")

_SEPARATORS: Final = "_-. "
_MAX_CANDIDATES: Final = 12
_MAX_VOTES: Final = 4096  # masks that propose rules; all masks score them
_MAX_SAMPLE: Final = 100  # masks whose names are cut at both ends in every way


@dataclass(frozen=True)
class NameRule:
    """What precedes and follows the common part in the file names of images and masks."""

    image_prefix: str = ""
    image_suffix: str = ""
    mask_prefix: str = ""
    mask_suffix: str = ""

    @property
    def length(self) -> int:
        """Characters outside the common part; 0 is the rule "equal names"."""
        return sum(map(len, astuple(self)))

    def image_key(self, key: Key) -> Key | None:
        """Return the part that an image shares with its mask; None if the name does not fit."""
        return _cut(key, self.image_prefix, self.image_suffix)

    def mask_key(self, key: Key) -> Key | None:
        """Return the part that a mask shares with its image; None if the name does not fit."""
        return _cut(key, self.mask_prefix, self.mask_suffix)

    def describe(self) -> str:
        """Return the rule in words."""
        kinds = ("image prefix", "image suffix", "mask prefix", "mask suffix")
        affixes = zip(kinds, astuple(self), strict=True)
        parts = [f"{kind} {text}" for kind, text in affixes if text]
        return f"with {' and '.join(parts)}" if parts else "by name"


@dataclass(frozen=True)
class RuleChoice:
    """The rules with the most pairs (several if the names are ambiguous), and that number.

    `beside` are rules for other files in the folder of masks, such as colored views.
    """

    rules: tuple[NameRule, ...]
    pairs: int
    beside: tuple[NameRule, ...] = ()

    def is_beside(self, mask: Key) -> bool:
        """Whether a file among the masks is not a mask but, for example, a colored view."""
        return any(rule.mask_key(mask) is not None for rule in self.beside)


def find_name_rules(images: Collection[Key], masks: Collection[Key]) -> RuleChoice:
    """Find the rule that gives the most pairs of images and masks.

    Equal names win if they pair all files, or as many as any incomplete rule. An affix needs a
    letter and a separator, or must be a word such as "mask"; any other affix is accepted only if
    no file remains unpaired. If both sides have an affix ("img_1", "gt_1"), it must be a word for
    images or masks.
    """
    image_keys, mask_keys = set(images), set(masks)
    plain = NameRule()
    if image_keys == mask_keys:
        return RuleChoice((plain,), len(image_keys))
    scores = {plain: len(image_keys & mask_keys)}
    seen = {frozenset((key, key) for key in image_keys & mask_keys)}
    for rule in sorted(_candidates(image_keys, mask_keys), key=lambda rule: rule.length):
        pairs = _pairs(rule, image_keys, mask_keys)
        if rule in scores or frozenset(pairs) in seen or not (pairs and _is_plausible(rule)):
            continue
        if _is_weak(rule) and not len(pairs) == len(image_keys) == len(mask_keys):
            continue
        seen.add(frozenset(pairs))
        scores[rule] = len(pairs)
    return _choose(scores, len(image_keys))


def _choose(scores: dict[NameRule, int], num_images: int) -> RuleChoice:
    best = max(scores.values())
    top = [rule for rule, score in scores.items() if score == best]
    plain = NameRule()
    affixes = {rule: _words(rule.mask_prefix + rule.mask_suffix) for rule in scores}
    beside = [rule for rule in scores if scores[rule] and affixes[rule] & BESIDE_WORDS]
    kept = [rule for rule in top if rule not in beside] or top
    if best == 0 or (plain in kept and best < num_images):
        kept = [plain]
    for word in ("labeltrainids", "labelids"):
        named = [rule for rule in kept if word in rule.mask_suffix.lower()]
        if len(named) == 1:
            beside += [rule for rule in kept if "labelids" in rule.mask_suffix.lower()]
            kept = named
    return RuleChoice(tuple(kept), best, tuple(rule for rule in beside if rule not in kept))


def _pairs(rule: NameRule, images: set[Key], masks: set[Key]) -> set[tuple[Key, Key]]:
    mask_of = {key: mask for mask in masks if (key := rule.mask_key(mask)) is not None}
    found = set()
    for image in images:
        key = rule.image_key(image)
        if key is not None and key in mask_of:
            found.add((image, mask_of[key]))
    return found


def _is_plausible(rule: NameRule) -> bool:
    """Whether an image affix is a known word, or one for masks on the other side."""
    own = rule.image_prefix or rule.image_suffix
    if not own or _word(own) in IMAGE_WORDS:
        return True
    return bool(_words(rule.mask_prefix or rule.mask_suffix) & (MASK_WORDS | BESIDE_WORDS))


def _is_weak(rule: NameRule) -> bool:
    affixes = (rule.mask_prefix, rule.mask_suffix)
    return any(affix and not is_affix(affix) for affix in affixes)


def is_affix(text: str) -> bool:
    """Whether a text is a plausible prefix or suffix: "_L", "mask", but not "1" or "a"."""
    if _word(text) in MASK_WORDS | BESIDE_WORDS:
        return True
    has_separator = text[0] in _SEPARATORS or text[-1] in _SEPARATORS
    return has_separator and any(character.isalpha() for character in text)


def _candidates(images: set[Key], masks: set[Key]) -> Iterator[NameRule]:
    some = sorted(masks)[:: 1 + len(masks) // _MAX_VOTES]
    for prefix, suffix in _image_affixes(images):
        bases = {cut for key in images if (cut := _cut(key, prefix, suffix)) is not None}
        if prefix or suffix:
            yield NameRule(prefix, suffix)
        for spans in (_heads, _tails):
            for affixes in _most_common(_mask_affixes(some, bases, spans), _MAX_CANDIDATES):
                yield NameRule(prefix, suffix, *affixes)
        both = _mask_affixes(some[:_MAX_SAMPLE], bases, _middles)
        for affixes in _most_common((pair for pair in both if all(map(is_affix, pair))), 3):
            yield NameRule(prefix, suffix, *affixes)


def _image_affixes(images: set[Key]) -> list[tuple[str, str]]:
    """Return no affix, and the prefix and the suffix that most images share."""
    prefixes, suffixes = Counter[str](), Counter[str]()
    for _, path in images:
        name = path.rpartition("/")[2]
        head = re.match(r"[A-Za-z]+[_\-. ]?(?=.)", name)
        tail = re.search(r"(?<=.)[_\-. ]?[A-Za-z][A-Za-z0-9]*$", name)
        prefixes.update([head.group()] if head else [])
        suffixes.update([tail.group()] if tail else [])
    found = [("", "")]
    found += [(text, "") for text, n in prefixes.most_common(1) if 2 * n > len(images)]
    found += [("", text) for text, n in suffixes.most_common(1) if 2 * n > len(images)]
    return found


def _mask_affixes(
    masks: Iterable[Key], bases: set[Key], spans: Callable[[int], Iterable[tuple[int, int]]]
) -> Iterator[tuple[str, str]]:
    """Yield what precedes and follows each span of a mask's name that is a base."""
    for split, path in masks:
        folder, slash, name = path.rpartition("/")
        for start, end in spans(len(name)):
            if (split, folder + slash + name[start:end]) in bases:
                yield name[:start], name[end:]


def _heads(length: int) -> Iterator[tuple[int, int]]:
    return ((0, end) for end in range(1, length))


def _tails(length: int) -> Iterator[tuple[int, int]]:
    return ((start, length) for start in range(1, length))


def _middles(length: int) -> Iterator[tuple[int, int]]:
    return combinations(range(1, length), 2)


def _most_common(affixes: Iterable[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Return the affixes by frequency; digits alone are not an affix."""
    found = [pair for pair, _ in Counter(affixes).most_common() if not "".join(pair).isdigit()]
    return found[:count]


def _cut(key: Key, prefix: str, suffix: str) -> Key | None:
    split, path = key
    folder, slash, name = path.rpartition("/")
    if len(name) <= len(prefix) + len(suffix):
        return None
    if not (name.startswith(prefix) and name.endswith(suffix)):
        return None
    return split, folder + slash + name[len(prefix) : len(name) - len(suffix)]


def _word(text: str) -> str:
    return text.strip(_SEPARATORS).lower()


def _words(text: str) -> set[str]:
    return {word.lower() for word in re.split(r"[_\-. ]+", text) if word}
