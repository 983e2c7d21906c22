"""Warnings about implausible predictions of a call; entry point `find_warnings`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from dcnseg.checkpoint import TrainingDataStats
from dcnseg.inference.image_stats import COLORED, GRAY, LARGER, SMALLER
from dcnseg.inference.results import FileResult

LARGE_PIXELS: Final = 256 * 256  # an image of this size usually has at least two classes


def find_warnings(
    results: Sequence[FileResult], stats: TrainingDataStats | None, num_classes: int
) -> list[str]:
    """Return one line per kind of warning, with the number of images and an example."""
    predicted = [result for result in results if result.is_predicted]
    lines = [] if stats is None else _warn_unlike_training(predicted, stats)
    lines += _warn_several_frames(predicted)
    if predicted and all(result.share_below == 1 for result in predicted):
        lines.append(
            "no pixel reaches --min-confidence. Confidence is low for images unlike the training "
            "images and after a short training; use a lower value."
        )
    is_complete = not any(result.share_below for result in predicted)
    names = {name for result in predicted for name in result.class_shares}
    is_enough = len(predicted) > 1 or any(prod(one.size_hw) >= LARGE_PIXELS for one in predicted)
    if len(names) == 1 and is_enough and is_complete and num_classes > 1:
        subject = f"all {len(predicted)} images" if len(predicted) > 1 else "the image"
        lines.append(
            f"every pixel of {subject} is {names.pop()!r}, one of {num_classes} classes. The "
            "network may not have learned the others; `dcnseg evaluate` shows the score of each."
        )
    return lines


def _warn_unlike_training(results: Sequence[FileResult], stats: TrainingDataStats) -> list[str]:
    low, high = _format_size(stats.min_size_hw), _format_size(stats.max_size_hw)
    sizes = low if low == high else f"{low} to {high}"
    advice = "If objects also differ in scale, resize the images before prediction."
    texts = {
        LARGER: f"much larger than the training images ({sizes}). {advice}",
        SMALLER: f"much smaller than the training images ({sizes}). {advice}",
        GRAY: "gray, but all training images are in color.",
        COLORED: "in color, but all training images are gray.",
    }
    lines = []
    for kind, text in texts.items():
        found = [result for result in results if kind in result.unlike_training]
        if found:
            first, count = found[0], len(found)
            lines.append(
                f"{count} of {len(results)} images {'is' if count == 1 else 'are'} {text} "
                f"Example: {first.image} ({_format_size(first.size_hw)})."
            )
    return lines


def _warn_several_frames(results: Sequence[FileResult]) -> list[str]:
    found = [result.image for result in results if result.has_more_frames]
    if not found:
        return []
    if len(found) == 1:
        return [f"{found[0]} has several pages or frames; only the first one is used."]
    return [
        f"{len(found)} of {len(results)} images have several pages or frames, for example "
        f"{found[0]}; only the first one is used."
    ]


def _format_size(size_hw: tuple[int, int]) -> str:
    return f"{size_hw[1]}x{size_hw[0]}"
