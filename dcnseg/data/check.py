"""What is wrong with a data set, file by file; the entry point is `inspect_samples`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final

import numpy as np

from dcnseg.data.class_map import IGNORE_INDEX, ClassMap
from dcnseg.data.dataset import read_label_map, size_mismatch
from dcnseg.data.folders import Sample
from dcnseg.data.image_io import read_size
from dcnseg.errors import DataError

_MAX_FINDINGS: Final = 10


@dataclass(frozen=True)
class DatasetSummary:
    """What a data set holds; lists per class go by training index.

    Attributes:
        num_images: Pictures, each with a mask.
        min_size_hw: Least height and least width (maybe of different pictures).
        max_size_hw: Greatest height and greatest width.
        pixel_counts: Pixels per class.
        image_counts: Pictures per class in which it occurs.
        ignored_pixels: Pixels of no class.
    """

    num_images: int
    min_size_hw: tuple[int, int]
    max_size_hw: tuple[int, int]
    pixel_counts: list[int]
    image_counts: list[int]
    ignored_pixels: int


@dataclass(frozen=True)
class _Inspected:
    size_hw: tuple[int, int]
    histogram: list[int]  # 256 entries, by training index
    encoding: str


def inspect_samples(
    samples: Sequence[Sample],
    class_map: ClassMap,
    *,
    workers: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    may_be_void: bool = False,
) -> DatasetSummary:
    """Open every picture and every mask, in parallel, and count the pixels of each class.

    Args:
        samples: What to look at.
        class_map: The classes that the masks may hold.
        workers: Threads; 0 means one per processor.
        on_progress: Called with (done, total) after each sample, from the calling thread.
        may_be_void: Whether every pixel may be ignored.

    Raises:
        DataError: Files are broken, a mask has another size than its image or holds values outside
            the classes, masks are encoded in different ways, or every pixel is ignored. Up to ten
            findings are listed, each with its file, and their total is said.
    """
    results, findings = _inspect_all(
        samples, class_map, workers or os.cpu_count() or 1, on_progress
    )
    findings += _mixed_encodings(samples, results)
    if findings:
        raise DataError(_report(findings, len(samples)))
    if not results:
        raise DataError("There is no picture to look at.")
    done = [results[index] for index in sorted(results)]
    histograms = np.array([one.histogram for one in done], np.int64)  # [N, 256]
    totals = histograms.sum(axis=0)
    if totals[:IGNORE_INDEX].sum() == 0 and not may_be_void:
        raise DataError(
            f"{samples[0].mask.parent}: every pixel of all {len(samples)} masks is ignored; there "
            "is nothing to learn from. Check `ignore` in the class list and --ignore-index."
        )
    sizes = np.array([one.size_hw for one in done])
    return DatasetSummary(
        num_images=len(done),
        min_size_hw=(int(sizes[:, 0].min()), int(sizes[:, 1].min())),
        max_size_hw=(int(sizes[:, 0].max()), int(sizes[:, 1].max())),
        pixel_counts=totals[: class_map.num_classes].tolist(),
        image_counts=(histograms[:, : class_map.num_classes] > 0).sum(axis=0).tolist(),
        ignored_pixels=int(totals[IGNORE_INDEX]),
    )


def _inspect_all(
    samples: Sequence[Sample],
    class_map: ClassMap,
    threads: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[dict[int, _Inspected], list[str]]:
    """Return the results by sample index, and the findings in the order of the samples."""
    results: dict[int, _Inspected] = {}
    errors: dict[int, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        pending: dict[Future[_Inspected], int] = {
            pool.submit(_inspect, sample, class_map): index for index, sample in enumerate(samples)
        }
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    index = pending.pop(future)
                    try:
                        results[index] = future.result()
                    except DataError as error:
                        errors[index] = str(error)
                    if on_progress:
                        on_progress(len(results) + len(errors), len(samples))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C: do not decode the rest
            raise
    return results, [errors[index] for index in sorted(errors)]


def _inspect(sample: Sample, class_map: ClassMap) -> _Inspected:
    size_hw = read_size(sample.image)
    labels, encoding = read_label_map(sample.mask, class_map)
    if labels.shape != size_hw:
        raise DataError(size_mismatch(sample, size_hw, labels.shape))
    return _Inspected(size_hw, np.bincount(labels.ravel(), minlength=256).tolist(), encoding)


def _mixed_encodings(samples: Sequence[Sample], results: dict[int, _Inspected]) -> list[str]:
    """Some masks as ids, some as colours: one of the two was probably not meant."""
    encodings = Counter(one.encoding for one in results.values())
    if len(encodings) < 2:
        return []
    rare = encodings.most_common()[-1][0]
    first = next(samples[index] for index, one in results.items() if one.encoding == rare)
    counts = " and ".join(f"{count} masks as {name}" for name, count in encodings.most_common())
    return [f"{first.mask}: read as {rare}, unlike others ({counts}). Write all in one way."]


def _report(findings: Sequence[str], total: int) -> str:
    if len(findings) == 1:
        return findings[0]
    shown = "\n".join(f"  {finding}" for finding in findings[:_MAX_FINDINGS])
    rest = len(findings) - _MAX_FINDINGS
    more = f"\n  ... and {rest} more" if rest > 0 else ""
    return f"{len(findings)} of {total} pictures cannot be used:\n{shown}{more}"
