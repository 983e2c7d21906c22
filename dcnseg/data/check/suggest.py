"""Suggests training settings from the results of a check: `suggest`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dcnseg.data.check.class_findings import (
    MAX_GUESSED,
    THRESHOLD,
    find_void_value,
    is_blurred,
    is_shifted_by_one,
    values_of,
)
from dcnseg.data.check.pairs import InspectedPair
from dcnseg.data.class_map import ClassMap, find_class_list
from dcnseg.data.label_codes import unpack_color

_MAX_CROP: Final = 512
_MIN_CROP: Final = 64
_CROP_STEP: Final = 32
_MAX_BATCH: Final = 8
_RARE: Final = 0.1  # fraction of an equal share of the pixels; rarer classes get more weight
_BLACK: Final = 0


@dataclass(frozen=True)
class Suggestion:
    """Settings for `dcnseg train`, named like its options."""

    classes: dict[str, Any] | None  # content for classes.json; None if no new list is needed
    ignore_index: tuple[int, ...]
    mask_threshold: int
    class_weights: str
    crop_size: tuple[int, int]
    batch_size: int
    command: str  # the command line for training


def suggest(
    root: Path,
    pairs: Sequence[InspectedPair],
    class_map: ClassMap | None,
    pixel_counts: Sequence[int],
    *,
    ignore: Sequence[int] = (),
    mask_threshold: int = 0,
    layout_options: Sequence[str] = (),
) -> Suggestion:
    """Choose settings for these images.

    `pixel_counts` are the training pixels of each class, `ignore` and `mask_threshold` the values
    of those options, and `layout_options` those by which the images were found.
    """
    values = values_of(pairs)
    has_list = find_class_list(root) is not None
    is_binary = not has_list or (class_map is not None and class_map.num_classes == 2)
    if not mask_threshold and is_blurred(values) and is_binary:
        mask_threshold = THRESHOLD
    void = None if has_list or mask_threshold else find_void_value(sorted(values))
    ignore_index = tuple(dict.fromkeys((*ignore, *([] if void is None else [void]))))
    weights = _class_weights(pixel_counts or _pixels_by_value(pairs, mask_threshold))
    is_shifted = class_map is not None and is_shifted_by_one(class_map, pairs)
    crop = _crop_size(pairs)
    batch = min(_MAX_BATCH, max(2, sum(pair.split == "train" for pair in pairs)))
    words = ["dcnseg", "train", str(root), "--out", f"runs/{root.resolve().name or 'run'}"]
    words += layout_options
    words += ["--crop-size", f"{crop[0]},{crop[1]}", "--batch-size", str(batch)]
    words += ["--class-weights", weights] if weights != "none" else []
    words += ["--ignore-index", ",".join(map(str, ignore_index))] if ignore_index else []
    words += ["--mask-threshold", str(mask_threshold)] if mask_threshold else []
    classes = _classes(pairs, class_map) if not has_list or is_shifted else None
    command = shlex.join(words)
    return Suggestion(classes, ignore_index, mask_threshold, weights, crop, batch, command)


def _class_weights(pixel_counts: Sequence[int]) -> str:
    """Choose weights by the rarest class's fraction of the pixels, relative to an equal share.

    Of two classes, "sqrt" raises one with 0.016 of the pixels to 0.11 of the loss; "balanced"
    would raise it to 0.5.
    """
    present = np.array([count for count in pixel_counts if count > 0], float)
    if len(present) < 2:
        return "none"
    share = present.min() / present.sum() * len(present)
    return "sqrt" if share < _RARE else "none"


def _pixels_by_value(pairs: Sequence[InspectedPair], mask_threshold: int) -> list[int]:
    """Return the pixels per value, if the classes are unknown."""
    totals: Counter[int] = Counter()
    for pair in pairs:
        if pair.mask is not None:
            totals.update(pair.mask.counts)
    if mask_threshold:
        above = sum(count for value, count in totals.items() if value >= mask_threshold)
        return [above, totals.total() - above]
    return list(totals.values()) if len(totals) <= MAX_GUESSED else []


def _crop_size(pairs: Sequence[InspectedPair]) -> tuple[int, int]:
    """Choose the middle size of the images, in steps of 32 and at most 512 a side."""
    sizes = np.array([pair.image.size_hw for pair in pairs if pair.image is not None])
    if not len(sizes):
        return _MAX_CROP, _MAX_CROP
    sides = np.median(sizes, axis=0) // _CROP_STEP * _CROP_STEP
    height, width = np.clip(sides, _MIN_CROP, _MAX_CROP).astype(int).tolist()
    return height, width


def _classes(pairs: Sequence[InspectedPair], class_map: ClassMap | None) -> dict[str, Any] | None:
    """Return the content of a class list that fits the masks, or None if they have no classes."""
    if class_map is not None and is_shifted_by_one(class_map, pairs):
        content = class_map.to_dict()
        return content | {"classes": [c | {"id": c["id"] + 1} for c in content["classes"]]}
    if any(pair.mask is not None and pair.mask.is_colored for pair in pairs):
        return _classes_of_colors(pairs)
    is_drawn = any(pair.mask is not None and pair.mask.mode == "polygons" for pair in pairs)
    if is_drawn or (class_map is not None and class_map.threshold):  # names count, not values
        return class_map.to_dict() if class_map else None
    values = sorted(values_of(pairs))
    if not 2 <= len(values) <= MAX_GUESSED or is_blurred(values_of(pairs)):
        return None
    void = find_void_value(values)
    content = ClassMap.from_values([value for value in values if value != void]).to_dict()
    if void is not None:
        content["ignore"] = [{"id": void, "name": "void"}]
    return content


def _classes_of_colors(pairs: Sequence[InspectedPair]) -> dict[str, Any] | None:
    """Number the colors of all masks, black first, the others by their pixels."""
    totals: dict[int, int] = {}
    for pair in pairs:
        if pair.mask is None:
            continue
        for value, count in pair.mask.counts.items():
            code = value * 0x010101 if not pair.mask.is_colored and value < 256 else value
            totals[code] = totals.get(code, 0) + count
    if not 2 <= len(totals) <= MAX_GUESSED:
        return None
    ordered = sorted(totals, key=lambda code: (code != _BLACK, -totals[code], code))
    entries = [
        {
            "id": index,
            "name": "black" if code == _BLACK else f"class_{index}",
            "color": list(unpack_color(code)),
        }
        for index, code in enumerate(ordered)
    ]
    return {"classes": entries, "ignore": []}
