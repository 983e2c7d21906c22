"""What makes the predictions of a whole call doubtful, in words; entry point `find_warnings`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from dcnseg.checkpoint import TrainingDataStats
from dcnseg.inference.image_stats import COLORED, GRAY, LARGER, SMALLER
from dcnseg.inference.results import FileResult

LARGE_PIXELS: Final = 256 * 256  # an image of so many pixels can be expected to show two classes


def find_warnings(
    results: Sequence[FileResult], seen: TrainingDataStats | None, num_classes: int
) -> list[str]:
    """One line per kind of doubt, with the number of images and the first of them.

    Args:
        results: What became of each image.
        seen: What the network was trained on, if that is known.
        num_classes: K.
    """
    predicted = [result for result in results if result.is_predicted]
    lines = [] if seen is None else _unlike_training(predicted, seen)
    lines += _several_frames(predicted)
    if predicted and all(result.share_below == 1 for result in predicted):
        lines.append(
            "no pixel reaches --min-confidence. A network is rarely that sure of images unlike its "
            "training's, or after a short training; lower it."
        )
    is_whole = not any(result.share_below for result in predicted)
    names = {name for result in predicted for name in result.class_shares}
    is_enough = len(predicted) > 1 or any(prod(one.size_hw) >= LARGE_PIXELS for one in predicted)
    if len(names) == 1 and is_enough and is_whole and num_classes > 1:
        what = f"all {len(predicted)} images" if len(predicted) > 1 else "the image"
        lines.append(
            f"every pixel of {what} is {names.pop()!r}, one of {num_classes} classes. The network "
            "may not have learned the others: `dcnseg evaluate` tells the score of each."
        )
    return lines


def _unlike_training(results: Sequence[FileResult], seen: TrainingDataStats) -> list[str]:
    low, high = _size(seen.min_size_hw), _size(seen.max_size_hw)
    sizes = low if low == high else f"{low} to {high}"
    scale_advice = "If what they show appears at another scale, too, resize them first."
    texts = {
        LARGER: f"much larger than the training's ({sizes}). {scale_advice}",
        SMALLER: f"much smaller than the training's ({sizes}). {scale_advice}",
        GRAY: "without colors, unlike all that the training saw.",
        COLORED: "in color, unlike all that the training saw.",
    }
    lines = []
    for kind, text in texts.items():
        found = [result for result in results if kind in result.unlike_training]
        if found:
            first, count = found[0], len(found)
            lines.append(
                f"{count} of {len(results)} images {'is' if count == 1 else 'are'} {text} "
                f"{'It' if count == 1 else 'The first'} is {first.image}"
                f" ({_size(first.size_hw)})."
            )
    return lines


def _several_frames(results: Sequence[FileResult]) -> list[str]:
    found = [result.image for result in results if result.has_more_frames]
    if not found:
        return []
    if len(found) == 1:
        return [f"{found[0]} has several pages or frames; only the first is read."]
    return [
        f"{len(found)} of {len(results)} images have several pages or frames, {found[0]} for one; "
        "only the first is read."
    ]


def _size(size_hw: tuple[int, int]) -> str:
    return f"{size_hw[1]}x{size_hw[0]}"
