"""What an exported model tells about itself; entry point `make_metadata`."""

from __future__ import annotations

import hashlib
import json
from typing import Final

import torch

from dcnseg import __version__
from dcnseg.checkpoint import WeightsInfo, make_header
from dcnseg.config import ExportConfig
from dcnseg.files import open_regular_file

_INPUTS: Final = {
    "uint8": "image: RGB, uint8 [B, H, W, 3]",
    "float": "image: RGB resized by input_scale, (value / 255 - mean) / std, float32 [B, 3, h, w]",
}
_OUTPUTS: Final = {
    "labels": "labels: class ids, [B, H, W]",
    "probabilities": "probabilities: softmax over the classes in their order, [B, K, H, W]",
    "logits": "logits: before softmax, at network resolution, [B, K, h, w]",
}


def make_metadata(info: WeightsInfo, config: ExportConfig) -> str:
    """Return the metadata of an exported model as JSON.

    It has the entries of a weights file (model, classes, preprocessing, scores), and:
        colors: Color of each class id, [r, g, b].
        export: Format, input and outputs, versions, and the weights file with its SHA-256.
    """
    with open_regular_file(info.path) as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    content = make_header(info) | {
        "colors": {str(entry.id): list(entry.color) for entry in info.class_map.classes},
        "export": {
            "format": config.format,
            "input": _INPUTS[config.input],
            "outputs": [_OUTPUTS[name] for name in config.outputs],
            "dcnseg": __version__,
            "torch": torch.__version__,
            "weights": info.path.as_posix(),
            "weights_sha256": digest,
        },
    }
    return json.dumps(content)
