"""A small network with a region head and random weights, which predicts regions of all classes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch

from dcnseg.checkpoint import save_weights
from dcnseg.config import ModelConfig, PredictConfig, Preprocessing
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.inference.predictor import Predictor
from dcnseg.models.region_head import PositionSensitiveVotes
from dcnseg.models.segmenter import Segmenter, build_segmenter

# The ids are not the training indices.
CLASSES: Final = ClassMap(
    (
        ClassInfo(0, "background", (0, 0, 0)),
        ClassInfo(7, "car", (0, 0, 142)),
        ClassInfo(3, "tree", (0, 128, 0)),
    )
)
SQUARE: Final = 20  # pixels
MODEL: Final = ModelConfig(
    encoder="resnet18",
    encoder_depth=3,
    architecture="plain",
    region_head="rfcn",
    region_bins=2,
    region_min_area=40,
)


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random squares, RGB uint8 [H, W, 3]."""
    size = -(-height // SQUARE), -(-width // SQUARE), 3
    squares = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return squares.repeat(SQUARE, 0).repeat(SQUARE, 1)[:height, :width]


@torch.no_grad()
def build_model(class_map: ClassMap = CLASSES) -> Segmenter:
    """Build the network; every class is predicted about as often as the others."""
    torch.manual_seed(1)
    model = build_segmenter(MODEL, class_map.num_classes).eval()
    predictor = Predictor(model, class_map, Preprocessing(), device=torch.device("cpu"))
    logits = model.coarse_logits(predictor.prepare(make_image(160, 240, seed=9)))
    layer = model.segmentation_head[0]  # type: ignore[index]
    scale = 1 / logits.std(dim=(0, 2, 3))
    layer.weight *= scale[:, None, None, None]
    layer.bias.copy_((layer.bias - logits.mean(dim=(0, 2, 3))) * scale)
    votes = get_votes(model)
    votes.score_maps.weight *= 10  # scores that differ
    votes.box_maps.weight *= 5
    return model


def get_votes(model: Segmenter) -> PositionSensitiveVotes:
    """The last layers of the region head."""
    votes = model.require_region_head().votes
    assert isinstance(votes, PositionSensitiveVotes)
    return votes


def build_region_predictor(
    config: PredictConfig | None = None, input_scale: float = 1.0
) -> Predictor:
    """Build the network's predictor on the CPU."""
    preprocessing = Preprocessing(input_scale=input_scale)
    return Predictor(
        build_model(), CLASSES, preprocessing, device=torch.device("cpu"), config=config
    )


def save_region_weights(path: Path, class_map: ClassMap = CLASSES) -> Path:
    """Write the network's weights file."""
    save_weights(
        path,
        build_model(class_map).state_dict(),
        model=MODEL,
        class_map=class_map,
        preprocessing=Preprocessing(),
        scores={},
    )
    return path
