"""Comparison of an exported model with its network; entry point `compare_outputs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from dcnseg.config import ExportConfig
from dcnseg.errors import ExportError
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.strips import resized, softmaxed, stored

MAX_DIFFERENCE: Final = 1e-3  # of logits and probabilities
MIN_EQUAL: Final = 0.9999  # share of the labels
MAX_SIDE: Final = 1024  # network pixels; larger images are cropped
_RANDOM_SIZES_HW: Final = ((64, 96), (97, 131), (129, 75))  # network pixels
_BATCH: Final = 2

Image = npt.NDArray[np.uint8]
Outputs = Mapping[str, npt.NDArray[Any]]
Runner = Callable[[npt.NDArray[Any]], Outputs]


@dataclass(frozen=True)
class Parity:
    """How much the results of an exported model differ from those of its network."""

    max_logit_difference: float
    max_probability_difference: float
    equal_labels: float  # share of the pixels
    num_random_images: int
    num_real_images: int

    def sentence(self) -> str:
        """Describe the comparison in one line."""
        return (
            f"{self.num_random_images} random and {self.num_real_images} real images: largest "
            f"difference of the logits {self.max_logit_difference:.2g}, equal labels "
            f"{100 * self.equal_labels:.4f} %"
        )


def compare_outputs(
    run: Runner, predictor: Predictor, config: ExportConfig, images: Sequence[Image]
) -> Parity:
    """Run an exported model on random images and `images`, and compare it with the network.

    Random images have three sizes, also odd ones; of real images, every second one is cropped to an
    odd size. The labels are compared as class ids.

    Args:
        run: Computes the outputs of a batch by their names.
        predictor: The network that was exported, in float32.
        config: Input and outputs of the exported model.
        images: RGB, uint8 [H, W, 3].

    Raises:
        ExportError: An output differs in shape, in more than `MAX_DIFFERENCE`, or in more than
            1 - `MIN_EQUAL` of the labels.
    """
    comparison = _Comparison(predictor, config)
    scale = predictor.preprocessing.input_scale
    for batch in _random_batches(scale):
        comparison.add(run, batch)
    for index, image in enumerate(images):
        side = int(MAX_SIDE / scale)
        height, width = (min(side, length) for length in image.shape[:2])
        if index % 2:
            height, width = (length - (length + 1) % 2 for length in (height, width))
        comparison.add(run, [image[:height, :width]])
    result = Parity(
        max_logit_difference=comparison.differences["logits"],
        max_probability_difference=comparison.differences["probabilities"],
        equal_labels=1 - comparison.num_unequal / max(1, comparison.num_labels),
        num_random_images=_BATCH * len(_RANDOM_SIZES_HW),
        num_real_images=len(images),
    )
    _check(result)
    return result


def _random_batches(scale: float) -> Iterator[list[Image]]:
    generator = np.random.default_rng(0)
    for size_hw in _RANDOM_SIZES_HW:
        height, width = (round(side / scale) for side in size_hw)
        yield list(generator.integers(0, 256, (_BATCH, height, width, 3), dtype=np.uint8))


class _Comparison:
    """Sums over the compared images."""

    def __init__(self, predictor: Predictor, config: ExportConfig) -> None:
        self.predictor = predictor
        self.config = config
        self.differences = {"logits": 0.0, "probabilities": 0.0}
        self.num_labels = self.num_unequal = 0

    def add(self, run: Runner, images: Sequence[Image]) -> None:
        """Compare the outputs for a batch of images of the same size."""
        if self.config.input == "uint8":
            outputs = run(np.stack(images))
        else:
            prepared = torch.cat([self.predictor.prepare(image) for image in images])
            outputs = run(prepared.contiguous().numpy())
        for index, image in enumerate(images):
            expected = self._expected(image)
            for name, values in outputs.items():
                self._compare(name, values[index], expected[name])

    @torch.inference_mode()
    def _expected(self, image: Image) -> Outputs:
        """Compute the outputs as the predictor does."""
        predictor = self.predictor
        logits = predictor.model(predictor.prepare(image))[0]
        size_hw = logits.shape[-2:] if self.config.input == "float" else image.shape[:2]
        height, width = (int(side) for side in size_hw)
        probabilities = resized(softmaxed(stored(logits)), (height, width)).rows(0, height)
        labels = probabilities.argmax(dim=0).numpy()
        return {
            "logits": logits.numpy(),
            "probabilities": probabilities.numpy(),
            "labels": predictor.class_map.decode_indices(labels),
        }

    def _compare(self, name: str, values: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
        if values.shape != expected.shape:
            raise ExportError(
                f"the exported model returns {name} {list(values.shape)} for an image; the network "
                f"returns {list(expected.shape)}. No file was written."
            )
        if name == "labels":
            self.num_labels += values.size
            self.num_unequal += int((values != expected).sum())
        else:
            difference = float(np.abs(values - expected).max())
            self.differences[name] = float(np.maximum(self.differences[name], difference))  # NaN


def _check(parity: Parity) -> None:
    difference = max(parity.max_logit_difference, parity.max_probability_difference)
    if not difference <= MAX_DIFFERENCE or parity.equal_labels < MIN_EQUAL:  # also of NaN
        raise ExportError(
            f"the exported model differs from the network ({parity.sentence()}); expected a "
            f"difference of at most {MAX_DIFFERENCE:g} and {100 * MIN_EQUAL:g} % equal labels. No "
            "file was written. Try another --format, or another version of its packages."
        )
