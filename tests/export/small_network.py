"""A small network with random weights and offsets, whose class ids are not the indices."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from dcnseg.checkpoint import save_weights
from dcnseg.config import ModelConfig, Preprocessing
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import Segmenter, build_segmenter

CLASSES: Final = ClassMap(
    (
        ClassInfo(0, "background", (0, 0, 0)),
        ClassInfo(7, "car", (0, 0, 142)),
        ClassInfo(3, "tree", (0, 128, 0)),
    )
)
MODEL: Final = ModelConfig(
    encoder="resnet18",
    encoder_depth=3,
    architecture="plain",
    deform_layers=2,
    modulated=True,
    offset_groups=2,
)


@torch.no_grad()
def build_model(class_map: ClassMap = CLASSES, model: ModelConfig = MODEL) -> Segmenter:
    """Build the network; no two classes have the same logits."""
    torch.manual_seed(0)
    network = build_segmenter(model, class_map.num_classes).eval()
    for layer in network.deformable_layers().values():
        nn.init.normal_(layer.conv_offset.weight, std=0.05)
    nn.init.normal_(network.segmentation_head[0].weight)  # type: ignore[index]
    return network


def build_predictor(input_scale: float = 1.0) -> Predictor:
    """Build the network's predictor on the CPU."""
    preprocessing = Preprocessing(input_scale=input_scale)
    return Predictor(build_model(), CLASSES, preprocessing, device=torch.device("cpu"))


def save_small_weights(
    path: Path, class_map: ClassMap = CLASSES, model: ModelConfig = MODEL, input_scale: float = 1.0
) -> Path:
    """Write the network's weights file."""
    save_weights(
        path,
        build_model(class_map, model).state_dict(),
        model=model,
        class_map=class_map,
        preprocessing=Preprocessing(input_scale=input_scale),
        scores={"mean_iou": 0.5},
    )
    return path


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pixels, RGB uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
