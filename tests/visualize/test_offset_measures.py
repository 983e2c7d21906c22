from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from dcnseg.config import ModelConfig, Preprocessing
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import build_segmenter
from dcnseg.visualize.offset_measures import measure_object_dilations

CLASSES = ClassMap((ClassInfo(0, "background", (0, 0, 0)), ClassInfo(1, "disc", (255, 0, 0))))


def make_predictor(scale: float) -> Predictor:
    """A network whose offsets stretch the grid by `scale`, everywhere alike."""
    config = ModelConfig(encoder="resnet18", encoder_depth=3, architecture="plain", deform_layers=2)
    model = build_segmenter(config, 2).eval()
    steps = torch.stack(torch.meshgrid(*[torch.arange(-1.0, 2.0)] * 2, indexing="ij"), -1)
    for layer in model.deformable_layers().values():
        assert layer.conv_offset.bias is not None
        layer.conv_offset.bias.data = (scale - 1) * steps.flatten()
    return Predictor(model, CLASSES, Preprocessing(), device=torch.device("cpu"))


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_objects_have_the_dilation_of_their_grid(scale: float) -> None:
    labels = np.zeros((96, 128), np.uint8)
    cv2.circle(labels, (40, 40), 20, 1, -1)
    cv2.circle(labels, (100, 60), 9, 1, -1)
    labels[90:94, 1:5] = 1  # has no output location (at multiples of 8 pixels)
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    found = measure_object_dilations(make_predictor(scale), image, labels)
    areas = [int((labels[:, :75] == 1)[:80].sum()), int((labels[:, 75:] == 1).sum())]
    names = ["encoder.layer2.1.conv1", "encoder.layer2.1.conv2"]
    assert [(entry.layer, entry.area) for entry in found] == [(n, a) for n in names for a in areas]
    assert [entry.dilation_px for entry in found] == pytest.approx([8 * scale] * 4)
