from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dcnseg import __version__
from dcnseg.checkpoint import parse_header, read_weights_info
from dcnseg.config import ExportConfig
from dcnseg.export.metadata import make_metadata
from tests.export.small_network import CLASSES, MODEL, save_small_weights


def test_metadata(tmp_path: Path) -> None:
    path = save_small_weights(tmp_path / "best.safetensors", input_scale=0.5)
    info = read_weights_info(path)
    text = make_metadata(info, ExportConfig("onnx", "uint8", ("logits", "labels")))
    parsed = parse_header(path, text)
    assert parsed == info
    assert (parsed.class_map, parsed.model) == (CLASSES, MODEL)
    content = json.loads(text)
    assert content["colors"] == {"0": [0, 0, 0], "7": [0, 0, 142], "3": [0, 128, 0]}
    export = content["export"]
    assert [entry.split(":")[0] for entry in export["outputs"]] == ["logits", "labels"]
    assert export["input"] == "image: RGB, uint8 [B, H, W, 3]"
    assert export["dcnseg"] == __version__
    assert export["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
