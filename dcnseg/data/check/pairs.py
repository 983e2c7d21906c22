"""Inspects all pairs in parallel; the entry point is `inspect_pairs`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dcnseg.data.check.cache import FactsCache, file_stamp
from dcnseg.data.check.findings import Finding, from_error
from dcnseg.data.check.inspection import (
    Facts,
    ImageFacts,
    MaskFacts,
    from_json,
    inspect_image,
    inspect_mask,
    inspect_polygons,
    to_json,
)
from dcnseg.data.pairing.splits import SPLIT_NAMES, Splits
from dcnseg.data.polygons.drawings import is_polygon_file
from dcnseg.data.sample import Sample
from dcnseg.errors import DataError

_REMOVE_IMAGE = "Restore the file, or remove it and its mask from the data."
_REMOVE_MASK = "Restore the file, or remove it and its image from the data."


@dataclass(frozen=True)
class InspectedPair:
    """A pair of a split; the facts of an unreadable file are None."""

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
    """Return the facts of each pair, and the files that cannot be read.

    New facts are added to the cache, which is not saved. With 0 `workers`, there is a thread per
    processor. `on_progress` is called with (done, total) after each pair, from the calling thread.
    """
    pairs = [(name, sample) for name in SPLIT_NAMES for sample in getattr(splits, name)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = [
            pool.submit(_inspect, split, sample, cache, polygon_ids) for split, sample in pairs
        ]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()  # raises the exception of the thread
                if on_progress:
                    on_progress(done, len(pairs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C: skip the rest
            raise
    results = [future.result() for future in futures]
    return [pair for pair, _ in results], [f for _, findings in results for f in findings]


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
        if is_polygon_file(sample.mask):  # not cached: the values depend on the classes
            mask = inspect_polygons(sample, polygon_ids)
        else:
            mask = _facts(sample.mask, "mask", cache, MaskFacts, inspect_mask)
    except DataError as error:
        findings.append(from_error("unreadable-mask", sample.mask, error, _REMOVE_MASK))
    return InspectedPair(split, sample, image, mask), findings


def _facts(
    path: Path, role: str, cache: FactsCache, kind: type[Facts], inspect: Callable[[Path], Facts]
) -> Facts:
    known = cache.get(path, role)
    if known is not None:
        with suppress(ValueError):  # a damaged cache
            return from_json(kind, known)
    stamp = file_stamp(path)
    facts = inspect(path)
    cache.put(path, role, stamp, to_json(facts))
    return facts
