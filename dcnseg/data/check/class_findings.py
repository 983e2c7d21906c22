"""Which classes a data set has; the entry points are `read_declared_classes` and `find_classes`.

Both `dcnseg check` and `dcnseg train` take the classes that are decided here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dcnseg.data.check.findings import ERROR, WARNING, Finding, from_error
from dcnseg.data.check.pairs import InspectedPair
from dcnseg.data.class_info import with_colors
from dcnseg.data.class_map import IGNORE_INDEX, MAX_CLASSES, ClassMap, describe_ids, find_class_list
from dcnseg.data.label_codes import MAX_ID
from dcnseg.data.pairing.splits import Pairing
from dcnseg.data.polygons.drawings import is_polygon_file, polygon_names
from dcnseg.data.sample import Sample
from dcnseg.errors import ConfigError, DataError

THRESHOLD: Final = 128  # suggested for masks with blurred values between 0 and 255
MAX_GUESSED: Final = 64  # more values or colors than this are not classes but a blurred mask
_RARE: Final = 0.02  # fraction of pixels below which values between two extremes are edges


@dataclass(frozen=True)
class DeclaredClasses:
    """The classes of a class list or of polygon labels, known before masks are decoded."""

    class_map: ClassMap | None  # None if there are none, or if a finding says why they are wrong
    polygon_ids: Mapping[str, int]  # id of each polygon label
    has_polygons: bool  # whether any mask is a file of polygons
    findings: list[Finding]  # problems in the class list and in the files of polygons


def read_declared_classes(root: Path, pairing: Pairing) -> DeclaredClasses:
    """Read the class list of a data folder, or the labels of polygons if there is no list."""
    samples = pairing.splits.all_samples()
    names, problems = polygon_names(sample.mask for sample in samples)
    findings = [
        Finding(ERROR, "annotations", str(problem.path), problem.what)
        for problem in dict.fromkeys((*pairing.problems, *problems))
    ]
    has_polygons = any(is_polygon_file(sample.mask) for sample in samples)
    ids: Mapping[str, int] = {name: index for index, name in enumerate(names)}
    class_list = find_class_list(root)
    class_map: ClassMap | None = None
    try:
        if class_list is not None:
            class_map = ClassMap.from_file(class_list)
            ids = class_map.ids_by_name
        elif has_polygons:
            class_map = _classes_from_labels(names, samples)
    except DataError as error:
        if class_list is not None:
            findings.append(from_error("classes", class_list, error))
        elif not findings:  # otherwise the cause has been reported
            path, _, text = str(error).partition(": ")
            findings.append(Finding(ERROR, "polygons", path, text))
    return DeclaredClasses(class_map, ids, has_polygons, findings)


def _classes_from_labels(names: Sequence[str], samples: Sequence[Sample]) -> ClassMap:
    image = next((sample.mask for sample in samples if not is_polygon_file(sample.mask)), None)
    if image:
        raise DataError(
            f"{image}: is an image, but other masks are polygons. Write classes.json to define "
            "which id and which label mean the same class."
        )
    if len(names) < 2:
        raise DataError(
            f"{samples[0].mask}: no polygon has a class label. Draw polygons and label them."
        )
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"{samples[0].mask}: the polygons have {len(names)} classes; at most {MAX_CLASSES} are "
            "possible. Remove classes, or write classes.json with `ignore` entries."
        )
    entries = [(number, name, None) for number, name in enumerate(names)]
    return ClassMap(with_colors(entries), (), "the polygon labels")


def find_classes(
    root: Path,
    pairs: Sequence[InspectedPair],
    declared: DeclaredClasses,
    ignore: Iterable[int],
    mask_threshold: int,
) -> tuple[ClassMap | None, list[Finding]]:
    """Return the classes to train on, or None and the reason.

    The ids in `ignore` are ignored in addition to those of the class list. Gray values from
    `mask_threshold` on are the class with the greater id; with 0, masks hold ids.
    """
    class_map, findings = declared.class_map, list[Finding]()
    class_list = find_class_list(root)
    is_declared = class_list is not None or declared.has_polygons
    try:
        if mask_threshold and declared.has_polygons:
            raise ConfigError(
                "--mask-threshold applies to gray masks, but the masks are polygons. Remove the "
                "option."
            )
        if mask_threshold and not is_declared:
            class_map = ClassMap.binary(IGNORE_INDEX)
        elif not is_declared:
            findings = _find_unusable_values(pairs)
            if not findings and any(pair.mask for pair in pairs):
                class_map = _classes_from_values(root, values_of(pairs))
                findings = _find_doubtful_classes(root, class_map)
        if class_map is not None:
            class_map = class_map.with_ignored(ignore).with_threshold(mask_threshold)
        return class_map, findings
    except (ConfigError, DataError) as error:
        return None, [from_error("classes", class_list or root, error)]


def values_of(pairs: Iterable[InspectedPair]) -> Counter[int]:
    """Return the pixels per value of all masks that are not in colors."""
    total: Counter[int] = Counter()
    for pair in pairs:
        if pair.mask is not None and not pair.mask.is_colored:
            total.update(pair.mask.counts)
    return total


def is_shifted_by_one(class_map: ClassMap, pairs: Iterable[InspectedPair]) -> bool:
    """Whether the mask values are the ids of the classes plus one."""
    values = set(values_of(pairs)) - set(class_map.ignored_ids)
    limits = min(class_map.ids) + 1, max(class_map.ids) + 1
    return bool(values) and (min(values), max(values)) == limits


def is_blurred(values: Counter[int]) -> bool:
    """Whether 0 and 255 dominate, with values between them from edges or JPEG compression."""
    if max(values, default=0) > IGNORE_INDEX or len(values) < 8:
        return False
    total = values.total()
    if len(values) > MAX_GUESSED:  # or there are many classes with scattered ids
        extreme = sum(count for value, count in values.items() if value <= 16 or value >= 240)
        return max(values) >= 240 and extreme > total / 2
    middle = [count for value, count in values.items() if 16 < value < 240]
    return len(middle) >= 6 and 0 in values and max(middle) < _RARE * total and max(values) > 240


def _classes_from_values(root: Path, values: Counter[int]) -> ClassMap:
    if len(values) > MAX_GUESSED:
        raise DataError(
            f"{root}: the masks have {len(values)} different values {min(values)}..{max(values)}; "
            f"classes are suggested for at most {MAX_GUESSED}. Write classes.json. If "
            "anti-aliasing or JPEG compression blurred the masks, save them again as PNG without "
            f"anti-aliasing, or, with two classes, pass --mask-threshold {THRESHOLD}."
        )
    if len(values) < 2:
        raise DataError(
            f"{root}: the only value in the masks is {min(values, default=IGNORE_INDEX)}; "
            "training needs at least two classes."
        )
    return ClassMap.from_values(values)


def _find_unusable_values(pairs: Sequence[InspectedPair]) -> list[Finding]:
    """Find masks without a class list whose values cannot be classes."""
    colored = [pair for pair in pairs if pair.mask and pair.mask.is_colored]
    if colored:
        first = colored[0]
        colors = {code for pair in colored if pair.mask for code in pair.mask.counts}
        what = f"is a color mask ({len(colored)} masks, {len(colors)} colors)"
        if len(colors) > MAX_GUESSED:
            what += (
                ". There are too many colors for classes: anti-aliasing or JPEG compression "
                "blurred the masks."
            )
            advice = "Save the masks again as PNG without anti-aliasing."
        else:
            what += ", and there is no class list."
            advice = 'Write classes.json with the "id", "name" and "color" of each class.'
        return [Finding(ERROR, "colors-without-classes", str(first.sample.mask), what, advice)]
    values = values_of(pairs)
    if not is_blurred(values):
        return []
    blurred = [p for p in pairs if p.mask and any(0 < value < 255 for value in p.mask.counts)]
    between = sum(count for value, count in values.items() if 0 < value < 255) / values.total()
    what = (
        f"has values between 0 and 255, like {len(blurred)} of the masks ({len(values)} values, "
        f"{between:.2g} of the pixels): anti-aliasing or JPEG compression blurred them."
    )
    advice = (
        f"Save the masks again as PNG without anti-aliasing, or pass --mask-threshold {THRESHOLD} "
        "for two classes."
    )
    return [Finding(ERROR, "smeared", str(blurred[0].sample.mask), what, advice)]


def _find_doubtful_classes(root: Path, class_map: ClassMap) -> list[Finding]:
    ids = sorted(class_map.ids)
    if ids in ([0, IGNORE_INDEX], [0, MAX_ID]):
        what = (
            f"the masks contain only the values 0 and {ids[1]}, which are interpreted as "
            "background and foreground."
        )
        advice = "Write classes.json (dcnseg check --write-classes) to choose the names."
        return [Finding(WARNING, "binary", str(root), what, advice)]
    void = find_void_value(ids)
    if void is None:
        return []
    rest = describe_ids([i for i in ids if i != void])
    what = f"the masks have the values {rest} and {void}; {void} is treated as a class."
    advice = f"If {void} marks unlabeled pixels, pass --ignore-index {void}."
    return [Finding(WARNING, "void-value", str(root), what, advice)]


def find_void_value(ids: Sequence[int]) -> int | None:
    """Return the greatest id if it is far from the others, as values for unlabeled pixels are."""
    if not ids:
        return None
    *others, last = sorted(ids)
    is_apart = len(others) >= 2 and last in (253, 254, 65534, 65535) and others[-1] < last // 2
    return last if is_apart else None
