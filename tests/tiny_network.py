"""A network of two convolutions with random weights, which predicts all of its classes."""

from __future__ import annotations

import torch
from segmentation_models_pytorch.base import SegmentationHead

from dcnseg.config import PredictConfig, Preprocessing
from dcnseg.data.class_map import ClassMap
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import Segmenter


def tiny_predictor(
    num_classes: int, config: PredictConfig, input_scale: float = 1.0, upsampling: int = 4
) -> Predictor:
    """A segmenter of two convolutions with a real segmentation head."""
    torch.manual_seed(num_classes)
    encoder = torch.nn.Conv2d(3, 4, 5, stride=upsampling, padding=2)
    head = SegmentationHead(4, num_classes, kernel_size=1, upsampling=upsampling)
    torch.nn.init.normal_(head[0].weight, std=3)
    model = Segmenter(encoder, torch.nn.Sigmoid(), head, output_stride=16)
    class_map = ClassMap.from_values(range(num_classes))
    preprocessing = Preprocessing(input_scale=input_scale)
    return Predictor(model, class_map, preprocessing, device=torch.device("cpu"), config=config)
