from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dcnseg.checkpoint import METADATA_KEY
from dcnseg.config import ExportConfig
from dcnseg.errors import ExportError
from dcnseg.export.exporting import export_network
from tests.export.small_network import CLASSES, random_image, save_small_weights

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8


def describe(value: Any) -> tuple[str, int, list[str | int]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]


def test_pixels_to_labels(tmp_path: Path) -> None:
    weights = save_small_weights(tmp_path / "best.safetensors", input_scale=0.5)
    out = tmp_path / "model.onnx"
    result = export_network(weights, out, ExportConfig(), [random_image(50, 71)])
    assert 0 < result.parity.max_logit_difference < 1e-4
    model = onnx.load(out)
    onnx.checker.check_model(model)
    (image,) = map(describe, model.graph.input)
    labels, logits = map(describe, model.graph.output)
    assert image == ("image", UINT8, ["batch", "height", "width", 3])
    assert labels == ("labels", UINT8, ["batch", "height", "width"])
    sides = ["batch", CLASSES.num_classes, "logits_height", "logits_width"]
    assert logits == ("logits", FLOAT, sides)
    assert [node.op_type for node in model.graph.node].count("DeformConv") == 2
    assert {node.domain for node in model.graph.node} == {""}  # standard operators only
    (entry,) = model.metadata_props
    assert entry.key == METADATA_KEY
    assert json.loads(entry.value)["preprocessing"]["input_scale"] == 0.5


def test_normalized_images_to_probabilities_without_native_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("exporting", "onnx_file"):
        monkeypatch.setattr(f"dcnseg.export.{module}.missing_reason", lambda _: "not built")
    weights = save_small_weights(tmp_path / "best.safetensors")
    config = ExportConfig("onnx", "float", ("probabilities", "logits"))
    result = export_network(weights, tmp_path / "model.onnx", config)
    assert result.parity.max_probability_difference < 1e-4
    model = onnx.load(tmp_path / "model.onnx")
    assert describe(model.graph.input[0]) == ("image", FLOAT, ["batch", 3, "height", "width"])
    assert [output.name for output in model.graph.output] == ["probabilities", "logits"]
    assert [node.op_type for node in model.graph.node].count("DeformConv") == 2


def test_the_size_of_files_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcnseg.export.onnx_file._MAX_BYTES", 1 << 20)
    weights = save_small_weights(tmp_path / "best.safetensors")
    config = ExportConfig("onnx", "float", ("logits",))
    with pytest.raises(ExportError, match="but an ONNX file holds at most 2 GiB"):
        export_network(weights, tmp_path / "model.onnx", config)
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]
