"""Checks a whole data set; the entry point is `check_data`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnseg.data.check.cache import FactsCache
from dcnseg.data.check.class_findings import find_classes, read_declared_classes
from dcnseg.data.check.findings import ERROR, WARNING, Finding, by_severity
from dcnseg.data.check.folder_findings import check_folder
from dcnseg.data.check.inspection import ImageFacts, MaskFacts
from dcnseg.data.check.pair_findings import check_pairs
from dcnseg.data.check.pairs import inspect_pairs
from dcnseg.data.check.suggest import Suggestion, suggest
from dcnseg.data.check.value_findings import LabelStats, check_values
from dcnseg.data.class_map import IGNORE_INDEX, ClassMap
from dcnseg.data.label_codes import unpack_color
from dcnseg.data.pairing.listing import find_unsupported
from dcnseg.data.pairing.splits import SPLIT_NAMES, Pairing

_MAX_LISTED_VALUES: Final = 256
_MAX_OTHER_FILES: Final = 100


@dataclass(frozen=True)
class ClassCount:
    """A class, the pixels that have it, and the images in which it occurs."""

    id: int
    name: str
    pixels: int
    images: int


@dataclass(frozen=True)
class ValueCount:
    """A value of the masks, or a color (red, green, blue), its pixels and images."""

    value: int | tuple[int, int, int]
    pixels: int
    images: int


@dataclass(frozen=True)
class CheckReport:
    """The result of a check."""

    root: Path  # the data folder
    layout: str  # how images and masks were found
    splits: dict[str, int]  # pairs per split
    images_without_mask: tuple[str, ...]
    masks_without_image: tuple[str, ...]
    other_files: tuple[str, ...]  # other files in the folder; up to 100
    skipped: dict[str, str]  # reasons by files that a user may expect to be read; up to 100
    sizes: dict[str, int]  # images per "WIDTHxHEIGHT"
    image_modes: dict[str, int]  # images per format, channels and bits
    mask_modes: dict[str, int]  # masks per format, channels, bits and encoding
    values: list[ValueCount]  # of the masks, the most frequent first; up to 256
    classes: list[ClassCount]  # empty if they are unknown
    ignored_pixels: int  # pixels without a class
    train_pixels: tuple[int, ...]  # pixels per class of the train split
    findings: list[Finding]  # errors first
    class_map: ClassMap | None  # the classes for training
    suggestion: Suggestion

    @property
    def is_clean(self) -> bool:
        """Whether training accepts the data; there may be warnings."""
        return not by_severity(self.findings, ERROR)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        num_images = sum(self.splits.values())
        return {
            "root": str(self.root),
            "is_clean": self.is_clean,
            "layout": self.layout,
            "splits": self.splits,
            "images_without_mask": list(self.images_without_mask),
            "masks_without_image": list(self.masks_without_image),
            "passed_over": list(self.other_files),
            "skipped": [{"file": file, "reason": reason} for file, reason in self.skipped.items()],
            "sizes": self.sizes,
            "image_modes": self.image_modes,
            "mask_modes": self.mask_modes,
            "values": _with_shares(self.values, num_images),
            "classes": _with_shares(self.classes, num_images),
            "ignored_pixels": self.ignored_pixels,
            "findings": [asdict(finding) for finding in self.findings],
            "suggestion": asdict(self.suggestion),
        }


def _with_shares(
    counts: Sequence[ClassCount] | Sequence[ValueCount], num_images: int
) -> list[dict[str, Any]]:
    total = max(1, sum(count.pixels for count in counts))
    return [
        asdict(count)
        | {"pixel_share": count.pixels / total, "image_share": count.images / max(1, num_images)}
        for count in counts
    ]


def check_data(
    root: Path,
    pairing: Pairing,
    *,
    ignore: Sequence[int] = (),
    mask_threshold: int = 0,
    workers: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    layout_options: Sequence[str] = (),
) -> CheckReport:
    """Check every file and report all problems at once.

    Files that have not changed since the last check are not opened again. The class list of `root`
    is optional. `ignore` and `mask_threshold` are as in `find_classes`, `workers` and `on_progress`
    as in `inspect_pairs`, and `layout_options` as in `suggest`.
    """
    cache = FactsCache(root)
    skipped = find_unsupported(root)
    declared = read_declared_classes(root, pairing)
    pairs, unreadable = inspect_pairs(
        pairing.splits,
        cache,
        polygon_ids=declared.polygon_ids,
        workers=workers,
        on_progress=on_progress,
    )
    cache.save()
    class_map, class_findings = find_classes(root, pairs, declared, ignore, mask_threshold)
    findings = _without_repeats(declared.findings, unreadable)
    findings += check_folder(root, pairing) + check_pairs(pairs) + class_findings
    label_stats = LabelStats([], [], [])
    if class_map is not None:
        label_stats = check_values(root, pairs, class_map, ignore)
        findings += label_stats.findings
    images = [pair.image for pair in pairs if pair.image]
    masks = [pair.mask for pair in pairs if pair.mask]
    num_classes = class_map.num_classes if class_map else 0
    train_pixels = tuple(label_stats.histogram("train")[:num_classes].tolist())
    return CheckReport(
        root=root,
        layout=pairing.layout,
        splits={name: len(getattr(pairing.splits, name)) for name in SPLIT_NAMES},
        images_without_mask=tuple(map(str, pairing.images_without_mask)),
        masks_without_image=tuple(map(str, pairing.masks_without_image)),
        other_files=_other_files(root, pairing, skipped),
        skipped={str(path): reason for path, reason in islice(skipped.items(), _MAX_OTHER_FILES)},
        sizes=_by_frequency(f"{image.size_hw[1]}x{image.size_hw[0]}" for image in images),
        image_modes=_by_frequency(map(_mode, images)),
        mask_modes=_by_frequency(f"{_mode(mask)}, {mask.encoding}" for mask in masks),
        values=_values(masks),
        classes=_classes(label_stats, class_map),
        ignored_pixels=int(label_stats.histogram()[IGNORE_INDEX]),
        train_pixels=train_pixels,
        findings=by_severity(findings, ERROR) + by_severity(findings, WARNING),
        class_map=class_map,
        suggestion=suggest(
            root,
            pairs,
            class_map,
            train_pixels,
            ignore=ignore,
            mask_threshold=mask_threshold,
            layout_options=layout_options,
        ),
    )


def _without_repeats(files: Sequence[Finding], images: Sequence[Finding]) -> list[Finding]:
    """Join findings of whole files and of their images without repeating any."""
    known = {(finding.file, finding.what) for finding in images}
    kept = [finding for finding in files if (finding.file, finding.what) not in known]
    return kept + list(dict.fromkeys(images))


def _other_files(root: Path, pairing: Pairing, skipped: Mapping[Path, str]) -> tuple[str, ...]:
    """Return the files below `root` that are not an image, a mask or a class list."""
    samples = pairing.splits.all_samples()
    known = {path for sample in samples for path in (sample.image, sample.mask)}
    known |= {*pairing.images_without_mask, *pairing.masks_without_image, *pairing.doubles}
    known |= {root / name for name in ("classes.json", "classes.txt")}
    names = {os.path.normpath(path) for path in known}
    left_out = {os.path.normpath(path) for path in skipped}
    found: list[str] = []
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(n for n in folders if os.path.normpath(Path(parent, n)) not in left_out)
        paths = (os.path.normpath(Path(parent, name)) for name in sorted(files))
        found += [path for path in paths if path not in names]
        if len(found) >= _MAX_OTHER_FILES:
            break
    return tuple(found[:_MAX_OTHER_FILES])


def _by_frequency(texts: Iterable[str]) -> dict[str, int]:
    return dict(Counter(texts).most_common())


def _mode(facts: ImageFacts | MaskFacts) -> str:
    return f"{facts.file_format} {facts.mode} {facts.bits} bit"


def _values(masks: Sequence[MaskFacts]) -> list[ValueCount]:
    pixels: Counter[tuple[bool, int]] = Counter()
    images: Counter[tuple[bool, int]] = Counter()
    for mask in masks:
        counts = {(mask.is_colored, value): count for value, count in mask.counts.items()}
        pixels.update(counts)
        images.update(counts.keys())
    return [
        ValueCount(unpack_color(value) if is_color else value, count, images[is_color, value])
        for (is_color, value), count in pixels.most_common(_MAX_LISTED_VALUES)
    ]


def _classes(label_stats: LabelStats, class_map: ClassMap | None) -> list[ClassCount]:
    if class_map is None:
        return []
    pixels = label_stats.histogram()
    images = sum((h > 0 for h in label_stats.histograms), np.zeros(256, np.int64))
    return [
        ClassCount(entry.id, entry.name, int(pixels[index]), int(images[index]))
        for index, entry in enumerate(class_map.classes)
    ]
