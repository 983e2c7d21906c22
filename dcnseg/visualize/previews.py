"""Images that show predictions beside their masks, with errors and class names.

Entry points: `draw_preview`, `draw_training_batch` and `draw_error_map`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from dcnseg.data.class_map import ClassMap
from dcnseg.inference.overlay import draw_legend, draw_overlay, present_classes
from dcnseg.lettering import INK, WHITE, write

CELL_WIDTH: Final = 420  # pixels
GAP: Final = 8
TITLE_SIZE: Final = 17
TITLE_HEIGHT: Final = 30
# Two colors of Okabe & Ito 2008, which color-blind people can tell apart.
MISSED: Final = (0, 114, 178)
FALSE_ALARM: Final = (230, 159, 0)
COLUMN_TITLES: Final = ("Image", "Mask", "Prediction", "Errors")
ERROR_NAMES: Final = (
    (MISSED, "missed: a false negative of the rarer class"),
    (FALSE_ALARM, "false alarm: a false positive of the rarer class"),
)

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PredictedSample:
    """An image with its labels and its prediction, both as training indices, uint8 [H, W]."""

    title: str
    image: UInt8Array
    labels: UInt8Array
    predicted: UInt8Array

    def resized(self) -> PredictedSample:
        """The same at the width of a cell."""
        image = _resize(self.image, cv2.INTER_AREA)
        labels, predicted = (_resize(m, cv2.INTER_NEAREST) for m in (self.labels, self.predicted))
        return PredictedSample(self.title, image, labels, predicted)


def draw_preview(
    samples: Sequence[PredictedSample], class_map: ClassMap, pixel_counts: npt.NDArray[np.int64]
) -> UInt8Array:
    """Draw a row of image, mask, prediction and errors for each sample, with a legend.

    Args:
        samples: The samples, top row first.
        class_map: The classes.
        pixel_counts: Labeled pixels of each class in the data set, [K]; see `draw_error_map`.
    """
    width = 4 * CELL_WIDTH + 5 * GAP
    page = [_title_row(COLUMN_TITLES)]
    for sample in (sample.resized() for sample in samples):
        cells = (
            sample.image,
            draw_overlay(sample.image, sample.labels, class_map),
            draw_overlay(sample.image, sample.predicted, class_map),
            draw_error_map(sample.image, sample.labels, sample.predicted, pixel_counts),
        )
        page += [_text_line(sample.title, width), _row_of_cells(cells)]
    shown = {i for s in samples for m in (s.labels, s.predicted) for i in _classes(m, class_map)}
    page += [draw_legend(class_map, shown, width), _error_legend(width)]
    return np.concatenate(page)


def draw_training_batch(
    images: Sequence[UInt8Array], labels: Sequence[UInt8Array], class_map: ClassMap
) -> UInt8Array:
    """Draw augmented training images, each above its mask, four in a row, with a legend."""
    width = 4 * CELL_WIDTH + 5 * GAP
    page = [_text_line("Augmented training images and their masks", width)]
    for start in range(0, len(images), 4):
        pairs = list(zip(images[start : start + 4], labels[start : start + 4], strict=True))
        page.append(_row_of_cells([image for image, _ in pairs]))
        page.append(_row_of_cells([draw_overlay(*pair, class_map) for pair in pairs]))
    shown = {i for label_map in labels for i in _classes(label_map, class_map)}
    return np.concatenate([*page, draw_legend(class_map, shown, width)])


def draw_error_map(
    image: UInt8Array,
    labels: UInt8Array,
    predicted: UInt8Array,
    pixel_counts: npt.NDArray[np.int64],
) -> UInt8Array:
    """Color the wrong pixels of an image, which becomes gray.

    A wrong pixel is a false negative of its true class and a false positive of its predicted class.
    The color tells which of the two is true of the rarer class: for an object on a background,
    these are the missed and the falsely predicted pixels of the object.

    Args:
        image: RGB, uint8 [H, W, 3].
        labels: Training indices, uint8 [H, W]; 255 is ignored.
        predicted: Training indices, uint8 [H, W].
        pixel_counts: Labeled pixels of each class in the data set, [K].

    Returns:
        RGB, uint8 [H, W, 3].
    """
    rank = np.zeros(256, np.uint8)  # 0 for the most frequent class
    rank[np.argsort(-pixel_counts, kind="stable")] = np.arange(len(pixel_counts))
    levels = (0.45 * np.arange(256) + 60).astype(np.uint8)
    drawn = np.repeat(levels[cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)][..., None], 3, axis=2)
    is_wrong = (labels != predicted) & (labels < len(pixel_counts))
    is_missed = rank[labels] > rank[predicted]
    drawn[is_wrong & is_missed] = MISSED
    drawn[is_wrong & ~is_missed] = FALSE_ALARM
    return drawn


def _classes(label_map: UInt8Array, class_map: ClassMap) -> list[int]:
    return present_classes(label_map, class_map.num_classes)


def _row_of_cells(images: Sequence[UInt8Array]) -> UInt8Array:
    """Up to four images of one size side by side, resized to the width of a cell."""
    cells = [_resize(image, cv2.INTER_AREA) for image in images]
    height = len(cells[0])
    row = np.full((height + GAP, 4 * CELL_WIDTH + 5 * GAP, 3), WHITE, np.uint8)
    for i, cell in enumerate(cells):
        left = GAP + i * (CELL_WIDTH + GAP)
        row[:height, left : left + CELL_WIDTH] = cell
    return row


def _resize(image: UInt8Array, interpolation: int) -> UInt8Array:
    """Resize an image or label map to the width of a cell; `interpolation` is for shrinking."""
    height, width = image.shape[:2]
    size = CELL_WIDTH, max(1, round(height * CELL_WIDTH / width))
    if width < CELL_WIDTH and interpolation == cv2.INTER_AREA:
        interpolation = cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=interpolation), np.uint8)


def _title_row(titles: Sequence[str]) -> UInt8Array:
    row = np.full((TITLE_HEIGHT, 4 * CELL_WIDTH + 5 * GAP, 3), WHITE, np.uint8)
    for i, title in enumerate(titles):
        write(row, title, (GAP + i * (CELL_WIDTH + GAP), 6), TITLE_SIZE)
    return row


def _text_line(text: str, width: int) -> UInt8Array:
    line = np.full((TITLE_HEIGHT, width, 3), WHITE, np.uint8)
    write(line, text, (GAP, 6), TITLE_SIZE)
    return line


def _error_legend(width: int) -> UInt8Array:
    line = np.full((TITLE_HEIGHT, width, 3), WHITE, np.uint8)
    for i, (color, text) in enumerate(ERROR_NAMES):
        left = GAP + i * width // 2
        cv2.rectangle(line, (left, 7), (left + 16, 23), color, -1)
        cv2.rectangle(line, (left, 7), (left + 16, 23), INK, 1)
        write(line, text, (left + 26, 4), TITLE_SIZE)
    return line
