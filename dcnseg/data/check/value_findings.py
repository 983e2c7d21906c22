"""Checks the values of masks against the classes; the entry point is `check_values`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcnseg.data.check.class_findings import THRESHOLD, is_shifted_by_one, values_of
from dcnseg.data.check.findings import ERROR, WARNING, Finding, from_error
from dcnseg.data.check.inspection import MaskFacts
from dcnseg.data.check.pairs import InspectedPair
from dcnseg.data.class_map import (
    IGNORE_INDEX,
    ClassMap,
    UnknownLabelsError,
    describe_ids,
    labels_advice,
)
from dcnseg.data.dataset import decode_mask
from dcnseg.data.label_codes import MAX_ID, pack_color, unpack_color
from dcnseg.errors import ConfigError

_LOSSY: Final = ("JPEG", "JPEG2000")
_TOPS: Final = (1, IGNORE_INDEX, MAX_ID)  # usual values of the foreground of two classes

_SAME_ENCODING: Final = "Use the same encoding for all masks."

Histogram = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelStats:
    """The masks that could be decoded, with their pixels per training index (256 elements)."""

    pairs: list[InspectedPair]
    histograms: list[Histogram]
    findings: list[Finding]

    def histogram(self, split: str | None = None) -> Histogram:
        """Return the pixels per training index of a split, or of all splits."""
        chosen = [
            histogram
            for pair, histogram in zip(self.pairs, self.histograms, strict=True)
            if split in (None, pair.split)
        ]
        total: Histogram = np.sum(chosen, axis=0) if chosen else np.zeros(256, np.int64)
        return total


def check_values(
    root: Path, pairs: Sequence[InspectedPair], class_map: ClassMap, ignore: Sequence[int] = ()
) -> LabelStats:
    """Decode the counted values of every mask, and find values that belong to no class.

    `ignore` has the ids of --ignore-index; the advice includes them.
    """
    label_stats = LabelStats([], [], [])
    findings = label_stats.findings
    encodings: dict[str, list[InspectedPair]] = defaultdict(list)
    unknown: list[tuple[InspectedPair, UnknownLabelsError]] = []
    for pair in pairs:
        if pair.mask is None:
            continue
        path = pair.sample.mask
        try:
            histogram, encoding = _decode(pair.mask, class_map)
        except UnknownLabelsError as error:
            unknown.append((pair, error))
            continue
        except ConfigError as error:
            findings.append(from_error("colors-without-classes", path, error))
            continue
        label_stats.pairs.append(pair)
        label_stats.histograms.append(histogram)
        encodings["alpha" if pair.mask.encoding == "alpha" else encoding].append(pair)
        findings += _check_mask(pair, histogram, class_map)
    findings += _shifted(root, pairs, class_map, unknown)
    findings += _unknown_values(unknown, ignore)
    findings += _mixed(encodings)
    if not class_map.threshold:
        findings += _foregrounds(root, pairs, class_map)
    findings += _palettes(pairs)
    findings += _without_pixels(root, label_stats, class_map)
    return label_stats


def _decode(mask: MaskFacts, class_map: ClassMap) -> tuple[Histogram, str]:
    try:
        indices, encoding = decode_mask(mask.distinct(), class_map)
    except UnknownLabelsError as error:
        counts: dict[Any, int] = {
            key: mask.counts[pack_color(key) if isinstance(key, tuple) else key]
            for key in error.counts
        }
        ordered = dict(sorted(counts.items(), key=lambda item: -item[1]))
        raise class_map.unknown_labels(ordered) from error
    weights = np.array(list(mask.counts.values()))
    histogram = np.bincount(indices.ravel(), weights=weights, minlength=256)
    return histogram.astype(np.int64), encoding


def _check_mask(pair: InspectedPair, histogram: Histogram, class_map: ClassMap) -> list[Finding]:
    assert pair.mask is not None
    path = str(pair.sample.mask)
    findings = []
    present = np.flatnonzero(histogram[: class_map.num_classes])
    if not len(present):
        values = list(pair.mask.counts)[:3]
        shown = ", ".join(str(unpack_color(v) if pair.mask.is_colored else v) for v in values)
        what = (
            f"every pixel is ignored (values: {shown}); the pair does not contribute to training."
        )
        findings.append(Finding(WARNING, "all-ignored", path, what, "Remove the pair."))
    elif len(present) == 1 and not histogram[IGNORE_INDEX]:
        name = class_map.names[present[0]]
        what = f"has only the class {name!r} (id {class_map.ids[present[0]]})."
        advice = "Ignore this if the image shows nothing else."
        findings.append(Finding(WARNING, "one-class", path, what, advice))
    if pair.mask.file_format in _LOSSY and not class_map.threshold:
        is_certain = pair.mask.num_values <= 2
        what = f"is a {pair.mask.file_format}, which changes values at class boundaries"
        what += "." if is_certain else f": {pair.mask.num_values} values."
        advice = "Save the mask again as PNG"
        advice += "." if is_certain else f", or pass --mask-threshold {THRESHOLD} for two classes."
        severity = WARNING if is_certain else ERROR
        findings.append(Finding(severity, "lossy-mask", path, what, advice))
    return findings


def _shifted(
    root: Path,
    pairs: Sequence[InspectedPair],
    class_map: ClassMap,
    unknown: Sequence[tuple[InspectedPair, UnknownLabelsError]],
) -> list[Finding]:
    ids = sorted(class_map.ids)
    values = set(values_of(pairs)) - set(class_map.ignored_ids)
    if not unknown or not is_shifted_by_one(class_map, pairs):
        return []
    what = (
        f"the masks have the values {describe_ids(sorted(values))}, but the ids of the {len(ids)} "
        f"classes are {describe_ids(ids)}: the values are shifted by one."
    )
    advice = "Write the ids of the masks to classes.json (below)."
    return [Finding(ERROR, "shifted-by-one", str(root), what, advice)]


def _unknown_values(
    unknown: Sequence[tuple[InspectedPair, UnknownLabelsError]], ignore: Sequence[int]
) -> list[Finding]:
    """Report unknown values; the advised --ignore-index covers all masks together."""
    values = {value for _, error in unknown for value in error.counts if isinstance(value, int)}
    common = labels_advice(values | set(ignore)) if values else ""
    findings = []
    for pair, error in unknown:
        own = labels_advice(error.counts)
        advice = common if "--ignore-index" in own else own
        path = str(pair.sample.mask)
        findings.append(Finding(ERROR, "unknown-values", path, error.what, advice))
    return findings


def _mixed(encodings: dict[str, list[InspectedPair]]) -> list[Finding]:
    """Find a mixture of masks with ids and masks with colors."""
    if len(encodings) < 2:
        return []
    ordered = sorted(encodings.items(), key=lambda item: -len(item[1]))
    counts = " and ".join(f"{len(pairs)} masks as {name}" for name, pairs in ordered)
    rare, pairs = ordered[-1]
    what = f"is read as {rare}, unlike others ({counts})."
    path = str(pairs[0].sample.mask)
    return [Finding(ERROR, "mixed-encodings", path, what, _SAME_ENCODING)]


def _foregrounds(root: Path, pairs: Sequence[InspectedPair], class_map: ClassMap) -> list[Finding]:
    """Find foregrounds that are 1 in some masks and 255 in others, or 255 but 1 in the list."""
    given = {entry.id for entry in class_map.ignored}
    by_top: dict[int, list[InspectedPair]] = defaultdict(list)
    for pair in pairs:
        values = set(pair.mask.counts) if pair.mask and not pair.mask.is_colored else {0}
        top = max(values)
        if top and (top not in _TOPS or not values <= {0, top}):
            return []
        if top and 0 in values and top not in given:  # a mask of 255 only has no labels
            by_top[top].append(pair)
    if len(by_top) > 1:
        ordered = sorted(by_top.items(), key=lambda item: -len(item[1]))
        counts = " and ".join(f"{len(pairs)} masks 0/{top}" for top, pairs in ordered)
        top, pairs = ordered[-1]
        what = (
            f"has the values 0 and {top}, unlike others ({counts}); a class must have the same "
            "value in all masks."
        )
        path = str(pairs[0].sample.mask)
        return [Finding(ERROR, "mixed-foreground", path, what, _SAME_ENCODING)]
    for top, pairs in by_top.items():
        if top in class_map.ignored_ids and 1 in class_map.ids and len(class_map.ids) == 2:
            what = (
                f"{len(pairs)} masks have only the values 0 and {top}, but {top} is ignored and no "
                f"mask has the id 1 of {class_map.names[class_map.ids.index(1)]!r}."
            )
            advice = f"Give that class the id {top} in classes.json."
            return [Finding(ERROR, "foreground-ignored", str(root), what, advice)]
    return []


def _palettes(pairs: Sequence[InspectedPair]) -> list[Finding]:
    """Find palette files in which an index has different colors."""
    first: dict[int, tuple[int, InspectedPair]] = {}
    for pair in pairs:
        for value, color in (pair.mask.palette if pair.mask else {}).items():
            known, owner = first.setdefault(value, (color, pair))
            if known != color:
                what = (
                    f"its palette gives the index {value} the color {unpack_color(color)}, but "
                    f"{owner.sample.mask.name} gives it {unpack_color(known)}; the indices are "
                    "used as ids, and the colors are ignored."
                )
                advice = (
                    "If the colors define the classes, save the masks as RGB and list the colors."
                )
                path = str(pair.sample.mask)
                return [Finding(WARNING, "palettes-differ", path, what, advice)]
    return []


def _without_pixels(root: Path, label_stats: LabelStats, class_map: ClassMap) -> list[Finding]:
    findings = []
    count = class_map.num_classes
    for split in ("train", "val"):
        masks = [pair.sample.mask for pair in label_stats.pairs if pair.split == split]
        if masks and not label_stats.histogram(split)[:count].any():
            what = (
                f"every pixel of all {len(masks)} masks is ignored; training needs labeled pixels."
            )
            advice = "Check `ignore` in the class list and --ignore-index."
            findings.append(Finding(ERROR, "nothing-to-learn", str(masks[0].parent), what, advice))
    histogram = label_stats.histogram("train")[:count]
    if histogram.any():
        for index in np.flatnonzero(histogram == 0):
            name = class_map.names[index]
            what = f"no training mask has the class {name!r} (id {class_map.ids[index]})."
            advice = "It cannot be learned. Remove it from the class list if it is not needed."
            findings.append(Finding(WARNING, "absent-class", str(root), what, advice))
    return findings
