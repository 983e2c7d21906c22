"""Which classes masks hold, with or without a class list; the entry point is `find_classes`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from dcnseg.data.check.findings import ERROR, WARNING, Finding, from_error
from dcnseg.data.check.inspection import MaskFacts
from dcnseg.data.check.pairs import InspectedPair
from dcnseg.data.class_map import IGNORE_INDEX, ClassMap, describe_ids
from dcnseg.data.dataset import classes_of_values, find_class_list
from dcnseg.data.label_codes import MAX_ID
from dcnseg.data.polygons.drawings import is_polygon_file
from dcnseg.errors import ConfigError, DataError

THRESHOLD: Final = 128  # suggested where masks are smeared between 0 and 255
_SMEARED_VALUES: Final = 64  # more than that are no classes
_RARE: Final = 0.02  # share of pixels below which a value between two extremes is an edge's


def values_of(pairs: Iterable[InspectedPair]) -> Counter[int]:
    """Return the pixels per value of all masks that are not in colors."""
    total: Counter[int] = Counter()
    for pair in pairs:
        if pair.mask is not None and not pair.mask.is_colored:
            total.update(pair.mask.counts)
    return total


def is_smeared(values: Counter[int]) -> bool:
    """Whether 0 and 255 stand out among values that edges or JPEG have mixed from them."""
    if max(values, default=0) > IGNORE_INDEX or len(values) < 8:
        return False
    total = values.total()
    if len(values) > _SMEARED_VALUES:  # or there are many classes, whose ids are spread out
        extreme = sum(count for value, count in values.items() if value <= 16 or value >= 240)
        return max(values) >= 240 and extreme > total / 2
    middle = [count for value, count in values.items() if 16 < value < 240]
    return len(middle) >= 6 and 0 in values and max(middle) < _RARE * total and max(values) > 240


def find_classes(
    root: Path,
    pairs: Sequence[InspectedPair],
    polygons: ClassMap | None,
    ignore: Iterable[int],
    mask_threshold: int,
) -> tuple[ClassMap | None, list[Finding]]:
    """Return the classes as training takes them, or None and why there are none.

    Args:
        root: The data folder, with or without a class list.
        pairs: Every pair.
        polygons: The classes of polygons, if masks are polygons and there is no class list.
        ignore: Ids to ignore besides those that the list ignores.
        mask_threshold: As `load_class_map`.
    """
    try:
        class_list = find_class_list(root)
        findings: list[Finding] = []
        if class_list is not None:
            class_map = ClassMap.from_file(class_list)
        elif polygons is not None:
            class_map = polygons
        elif any(is_polygon_file(pair.sample.mask) for pair in pairs):
            return None, []  # why was found where the names were read
        elif mask_threshold:
            class_map = ClassMap.binary(IGNORE_INDEX)
        else:
            findings = _why_no_classes(pairs)
            if findings or not any(pair.mask for pair in pairs):
                return None, findings
            class_map = classes_of_values(root, values_of(pairs))
            findings = _doubtful_classes(root, class_map, pairs)
        return class_map.with_ignored(ignore).with_threshold(mask_threshold), findings
    except (ConfigError, DataError) as error:
        place = find_class_list(root) or root
        return None, [from_error("classes", place, error)]


def _why_no_classes(pairs: Sequence[InspectedPair]) -> list[Finding]:
    """Masks without a class list whose values cannot be classes."""
    colored = [pair for pair in pairs if pair.mask and pair.mask.is_colored]
    if colored:
        first = colored[0]
        colors = {code for pair in colored if pair.mask for code in pair.mask.counts}
        what = f"is in colors ({len(colored)} masks, {len(colors)} colors)"
        if len(colors) > _SMEARED_VALUES:
            what += ", far too many for classes: JPEG or smooth edges have smeared them."
            advice = "Make the masks again as PNG without smooth edges."
        else:
            what += ", and there is no class list."
            advice = 'Write classes.json with the "id", "name" and "color" of each class.'
        return [Finding(ERROR, "colors-without-classes", str(first.sample.mask), what, advice)]
    values = values_of(pairs)
    if not is_smeared(values):
        return []
    smeared = [pair for pair in pairs if pair.mask and _has_between(pair.mask)]
    between = sum(count for value, count in values.items() if 0 < value < 255) / values.total()
    what = (
        f"has values between 0 and 255, as {len(smeared)} of the masks have ({len(values)} values, "
        f"{100 * between:.2g} % of the pixels between): smooth edges or JPEG have smeared them."
    )
    advice = f"Make sharp masks, or pass --mask-threshold {THRESHOLD} for two classes."
    return [Finding(ERROR, "smeared", str(smeared[0].sample.mask), what, advice)]


def _has_between(mask: MaskFacts) -> bool:
    return any(0 < value < 255 for value in mask.counts)


def _doubtful_classes(
    root: Path, class_map: ClassMap, pairs: Sequence[InspectedPair]
) -> list[Finding]:
    ids = sorted(class_map.ids)
    where = str(root)
    if ids in ([0, IGNORE_INDEX], [0, MAX_ID]):
        what = f"the masks hold 0 and {ids[1]} only; these are taken as background and foreground."
        advice = "Write classes.json (dcnseg check --write-classes) to name them yourself."
        return [Finding(WARNING, "binary", where, what, advice)]
    void = void_value(ids)
    if void is None:
        return []
    rest = describe_ids([i for i in ids if i != void])
    what = f"the masks hold {rest} and, apart from these, {void}, which is taken as a class."
    advice = f"If it marks pixels of no class, pass --ignore-index {void}."
    return [Finding(WARNING, "void-value", where, what, advice)]


def void_value(ids: Sequence[int]) -> int | None:
    """Return a greatest id that stands apart from the others as a mark of void does."""
    if not ids:
        return None
    *others, last = sorted(ids)
    is_apart = len(others) >= 2 and last in (253, 254, 65534, 65535) and others[-1] < last // 2
    return last if is_apart else None
