from __future__ import annotations

import json
from pathlib import Path

import pytest

from dcnseg.checkpoint import METADATA_KEY
from dcnseg.config import ExportConfig
from dcnseg.export.exporting import export_network
from tests.export.small_network import random_image, save_small_weights

openvino = pytest.importorskip("openvino", reason="openvino is not installed")


def test_pixels_to_labels(tmp_path: Path) -> None:
    weights = save_small_weights(tmp_path / "best.safetensors", input_scale=0.5)
    out = tmp_path / "new" / "model.xml"
    result = export_network(weights, out, ExportConfig("openvino"), [random_image(50, 71)])
    assert result.paths == (out.with_suffix(".bin"), out)
    assert set(out.parent.iterdir()) == set(result.paths)
    assert 0 < result.parity.max_logit_difference < 1e-3
    model = openvino.Core().read_model(out)
    assert [port.get_any_name() for port in (*model.inputs, *model.outputs)] == [
        *("image", "labels", "logits")
    ]
    assert str(model.input().partial_shape) == "[?,?,?,3]"
    metadata = json.loads(model.get_rt_info([METADATA_KEY]).astype(str))
    assert metadata["export"]["format"] == "openvino"
