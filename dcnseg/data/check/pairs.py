"""Looks at all pairs in parallel; the entry point is `inspect_pairs`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dcnseg.data.check.cache import FactsCache
from dcnseg.data.check.findings import Finding, from_error
from dcnseg.data.check.inspection import (
    ImageFacts,
    MaskFacts,
    inspect_image,
    inspect_mask,
    inspect_polygons,
)
from dcnseg.data.pairing.splits import SPLIT_NAMES, Splits
from dcnseg.data.polygons.drawings import is_polygon_file
from dcnseg.data.sample import Sample
from dcnseg.errors import DataError

_REMOVE_IMAGE = "Get the file again, or take it and its mask out of the data."
_REMOVE_MASK = "Make the mask again, or take it and its image out of the data."


@dataclass(frozen=True)
class InspectedPair:
    """A pair of a split; a file that cannot be read has no facts."""

    split: str
    sample: Sample
    image: ImageFacts | None
    mask: MaskFacts | None


def inspect_pairs(
    splits: Splits,
    cache: FactsCache,
    *,
    polygon_ids: Mapping[str, int],
    workers: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[InspectedPair], list[Finding]]:
    """Return what was seen of each pair, and the files that cannot be read.

    Args:
        splits: What to look at.
        cache: Asked first, and told what is new; it is not saved.
        polygon_ids: The ids of classes by name, for masks that are polygons.
        workers: Threads; 0 means one per processor.
        on_progress: Called with (done, total) after each pair, from the calling thread.
    """
    pairs = [(name, sample) for name in SPLIT_NAMES for sample in getattr(splits, name)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = [
            pool.submit(_inspect, split, sample, cache, polygon_ids) for split, sample in pairs
        ]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()  # raises what was raised in it
                if on_progress:
                    on_progress(done, len(pairs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C: do not decode the rest
            raise
    results = [future.result() for future in futures]
    return [inspected for inspected, _ in results], _concat([findings for _, findings in results])


def _concat(groups: Sequence[Sequence[Finding]]) -> list[Finding]:
    return [finding for group in groups for finding in group]


def _inspect(
    split: str, sample: Sample, cache: FactsCache, polygon_ids: Mapping[str, int]
) -> tuple[InspectedPair, list[Finding]]:
    findings: list[Finding] = []
    image: ImageFacts | None = None
    mask: MaskFacts | None = None
    try:
        image = _facts(sample.image, "image", cache, ImageFacts, inspect_image)
    except DataError as error:
        findings.append(from_error("unreadable-image", sample.image, error, _REMOVE_IMAGE))
    try:
        if is_polygon_file(sample.mask):  # what they give depends on the classes, too
            mask = inspect_polygons(sample, polygon_ids)
        else:
            mask = _facts(sample.mask, "mask", cache, MaskFacts, inspect_mask)
    except DataError as error:
        findings.append(from_error("unreadable-mask", sample.mask, error, _REMOVE_MASK))
    return InspectedPair(split, sample, image, mask), findings


Facts = TypeVar("Facts", ImageFacts, MaskFacts)


def _facts(
    path: Path, role: str, cache: FactsCache, kind: type[Facts], inspect: Callable[[Path], Facts]
) -> Facts:
    known = cache.get(path, role)
    if known is not None:
        with suppress(ValueError):  # what a damaged cache holds is not known
            return kind.from_json(known)
    stamp = cache.stamp(path)
    facts = inspect(path)
    cache.put(path, role, stamp, facts.to_json())
    return facts
