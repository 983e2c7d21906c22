"""Images and masks in one folder, distinguished by affix or extension; entry `read_one_folder`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from dcnseg.data.pairing.folder_names import PlacedFile
from dcnseg.data.pairing.name_rules import Key, NameRule, RuleChoice, find_name_rules
from dcnseg.data.pairing.readings import Reading, choose_reading
from dcnseg.data.pairing.role_words import BESIDE_WORDS, IMAGE_WORDS, MASK_WORDS
from dcnseg.data.pairing.splits import Entry

_LOSSY: Final = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".webp"})
_HEAD: Final = re.compile(r"^[A-Za-z]+[_\-. ](?=.)")
_TAILS: Final = (
    re.compile(r"[_\-. ][A-Za-z]\w*?$"),  # _L
    re.compile(r"[_\-. ][A-Za-z0-9]+[_\-. ][A-Za-z0-9]+$"),  # _gtFine_labelIds
    re.compile(r"(?<=[^A-Za-z_\-. ])[A-Za-z]+$"),  # "mask" of "0001mask"
)


def read_one_folder(root: Path, files: Sequence[PlacedFile]) -> Reading | None:
    """Separate masks from images by an affix such as _mask or _L, or .png beside .jpg.

    Returns:
        None if no name marks a mask.

    Raises:
        DataError: The names can be read in more than one way.
    """
    entries = [file.entry for file in files]
    readings = [_read_by_affix(files, rule) for rule in _mask_affixes(entries)]
    readings.append(_read_by_extension(files))
    found = [reading for reading in readings if reading]
    best = max((reading.choice.pairs for reading in found), default=0)
    return choose_reading(root, [reading for reading in found if reading.choice.pairs == best])


def _mask_affixes(entries: Sequence[Entry]) -> Iterator[NameRule]:
    """Yield the most common prefixes and suffixes that are words for masks."""
    affixes = Counter[tuple[str, str]]()
    for entry in entries:
        name = entry.stem.rpartition("/")[2]
        head = _HEAD.search(name)
        if head and _is_mask_word(head.group()):
            affixes[head.group(), ""] += 1
        for tail in _TAILS:
            for match in tail.finditer(name):
                if match.start() > 0 and _is_mask_word(match.group()):
                    affixes["", match.group()] += 1
    for (prefix, suffix), _ in affixes.most_common(6):
        yield NameRule("", "", prefix, suffix)


def _is_mask_word(text: str) -> bool:
    words = [word.lower() for word in re.split(r"[_\-. ]+", text) if word]
    return words[-1] in MASK_WORDS or words[0] in MASK_WORDS - {"l", "y"}


def _read_by_affix(files: Sequence[PlacedFile], mask_rule: NameRule) -> Reading | None:
    masks = [file for file in files if mask_rule.mask_key(file.entry.key)]
    others = [file for file in files if not mask_rule.mask_key(file.entry.key)]
    names = {file.entry.key for file in others}
    images = [file for file in others if not _is_beside(file.entry, names)]
    if not masks or not images:
        return None
    stripped: list[Key] = [key for mask in masks if (key := mask_rule.mask_key(mask.entry.key))]
    image_keys = [image.entry.key for image in images]
    # With the roles exchanged: what images have in addition to their masks, "a_sat" + "a_mask".
    own = find_name_rules(stripped, image_keys).rules[0]
    prefix, suffix = own.mask_prefix, own.mask_suffix
    if (prefix or suffix) and (prefix + suffix).strip("_-. ").lower() not in IMAGE_WORDS:
        prefix = suffix = ""
    rule = NameRule(prefix, suffix, mask_rule.mask_prefix, mask_rule.mask_suffix)
    num_pairs = len({rule.image_key(key) for key in image_keys} & set(stripped))
    layout = f"one folder, {rule.describe()}"
    return Reading(images, masks, RuleChoice((rule,), num_pairs), layout)


def _is_beside(entry: Entry, names: set[Key]) -> bool:
    """Whether a file is a colored view or the like of another one: "a_color" of "a"."""
    match = re.search(r"[_\-. ][A-Za-z]+$", entry.stem)
    if not match or match.group()[1:].lower() not in BESIDE_WORDS:
        return False
    return (entry.split, entry.stem[: match.start()]) in names


def _read_by_extension(files: Sequence[PlacedFile]) -> Reading | None:
    """Take a.jpg as the image of the mask a.png, if every file has such a partner."""
    images = [file for file in files if file.entry.path.suffix.lower() in _LOSSY]
    masks = [file for file in files if file.entry.path.suffix.lower() not in _LOSSY]
    keys = [sorted(file.entry.key for file in some) for some in (images, masks)]
    if not images or keys[0] != keys[1]:
        return None
    choice = RuleChoice((NameRule(),), len(images))
    return Reading(images, masks, choice, "one folder, by name, .jpg + .png")
