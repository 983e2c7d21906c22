"""The cost of the region head: a training step, and a prediction with 64 regions.

The network without a region head is the reference. Images are noise; objects and regions are
rectangles, 64 in an image.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import Call, Timing, alternate, describe_machine, markdown_table
from dcnseg.config import REGION_HEADS, DataConfig, ModelConfig, Preprocessing, TrainConfig
from dcnseg.data.class_map import ClassMap
from dcnseg.engine.loading import BatchGroup
from dcnseg.engine.optim import build_loss
from dcnseg.engine.region_objective import build_region_objective
from dcnseg.engine.state import build_state
from dcnseg.engine.step import TrainingStep
from dcnseg.inference import predictor as predictor_module
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import build_segmenter
from dcnseg.scoring.objects import find_objects

CLASSES = ClassMap.from_values(range(11))
CPU = torch.device("cpu")
GRID = 8  # rectangles along each axis


def make_labels(height: int, width: int) -> npt.NDArray[np.uint8]:
    """A label map of 64 rectangles of the classes 1 to 10 on class 0."""
    labels = np.zeros((height, width), np.uint8)
    rows, columns = height // GRID, width // GRID
    for number in range(GRID * GRID):
        top, left = number // GRID * rows, number % GRID * columns
        labels[top + 2 : top + rows - 2, left + 2 : left + columns - 2] = 1 + number % 10
    return labels


def make_step(model: ModelConfig, batch: int, size_hw: tuple[int, int]) -> Call:
    """Return an update of all weights from a batch of noise, in float32."""
    config = TrainConfig(DataConfig(Path()), model, encoder_weights="none", amp="off", device="cpu")
    state = build_state(
        config, num_classes=11, updates_per_epoch=1000, device=CPU, encoder_weights="none"
    )
    state.model.train()
    regions = build_region_objective(config, range(1, 11), 11)
    training_step = TrainingStep(state, build_loss("ce", None), CPU, None, regions)
    images = torch.randn(batch, 3, *size_hw, generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(make_labels(*size_hw)).long().expand(batch, -1, -1)
    return lambda: training_step(BatchGroup(1, [(images, labels)]))


def make_prediction(model: ModelConfig, size_hw: tuple[int, int]) -> Call:
    """Return a prediction of an image of noise, with 64 regions if there is a region head."""
    predictor = Predictor(build_segmenter(model, 11), CLASSES, Preprocessing(), device=CPU)
    predictor.model.to(memory_format=torch.channels_last)
    image = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    labels = make_labels(*size_hw)

    def predict() -> None:
        # An untrained network predicts few regions; its label map is replaced.
        with patch.object(
            predictor_module,
            "find_objects",
            lambda _labels, classes, min_area: find_objects(labels, classes, min_area),
        ):
            predictor.predict(image, regions=predictor.has_region_head)

    return predict


def measure(model: ModelConfig, batch: int, size_hw: tuple[int, int], rounds: int) -> str:
    """Return a table of both calls for each region head."""
    models = {name: replace(model, region_head=name) for name in REGION_HEADS}
    rows = []
    makers: dict[str, Callable[[ModelConfig], Call]] = {
        f"training step, {batch} images": lambda each: make_step(each, batch, size_hw),
        "prediction": lambda each: make_prediction(each, size_hw),
    }
    for title, make in makers.items():
        timings: dict[str, Timing] = alternate(
            {name: make(each) for name, each in models.items()}, rounds
        )
        reference = timings["none"]
        rows += [
            (title, name, f"{timing.median:.1f}", f"{timing.ratio_to(reference):.3f}")
            for name, timing in timings.items()
        ]
    columns = ("Call", "Region head", "Median (ms)", "Median ratio to none")
    return markdown_table(columns, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--bins", type=int, default=ModelConfig.region_bins)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--height", type=int, default=176)
    parser.add_argument("--width", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = ModelConfig(encoder=options.encoder, region_bins=options.bins)
    size_hw = options.height, options.width
    print(describe_machine())
    print(
        f"DeepLabV3+ with {options.encoder}, {size_hw[0]}x{size_hw[1]}, {options.bins}x"
        f"{options.bins} bins, 11 classes, float32, {options.threads} threads\n"
    )
    print(measure(model, options.batch_size, size_hw, options.rounds))


if __name__ == "__main__":
    main()
