from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dcnseg import Predictor
from dcnseg.config import ExportConfig, PredictConfig
from dcnseg.errors import CheckpointError, ConfigError
from dcnseg.export.exporting import export_network
from tests.export.small_network import random_image, save_small_weights

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

WINDOWS = PredictConfig(window=64, overlap=0.5, flip=True)
SCALES = PredictConfig(window=64, flip=True, scales=(0.75, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and models with both kinds of input."""
    folder = tmp_path_factory.mktemp("models")
    weights = save_small_weights(folder / "best.safetensors", input_scale=0.5)
    for name in ("uint8", "float"):
        export_network(weights, folder / f"{name}.onnx", ExportConfig("onnx", name))
    return folder


@pytest.mark.parametrize(
    ("name", "config", "tolerance"),
    [
        ("uint8", WINDOWS, 2e-3),
        ("float", WINDOWS, 2e-3),
        ("uint8", SCALES, 0.1),
        ("float", SCALES, 2e-3),
    ],
)
def test_predictions_are_those_of_the_run(
    folder: Path, name: str, config: PredictConfig, tolerance: float
) -> None:
    image = random_image(150, 201)
    original = Predictor.load(folder / "best.safetensors", device="cpu", config=config)
    exported = Predictor.load(folder / f"{name}.onnx", config=config)
    expected, found = (
        predictor.predict(image, with_confidence=True, with_probabilities=True)
        for predictor in (original, exported)
    )
    assert expected.probabilities is not None
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=tolerance)
    assert (found.labels == expected.labels).mean() > (0.999 if tolerance < 0.1 else 0.95)
    assert found.class_map == expected.class_map
    assert not exported.has_region_head


def test_the_metadata_is_that_of_the_run(folder: Path) -> None:
    original = Predictor.from_checkpoint(folder / "best.safetensors", device="cpu")
    exported = Predictor.from_onnx(folder / "uint8.onnx")
    assert exported.preprocessing == original.preprocessing
    assert exported.training_data == original.training_data
    assert exported.model.deformable_layers() == {}


def test_what_models_do_not_have(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--amp is bf16, but exported models run in float32"):
        Predictor.load(folder / "uint8.onnx", amp="bf16")
    with pytest.raises(ConfigError, match="An exported model has no region head, which scores"):
        Predictor.from_onnx(folder / "uint8.onnx", config=PredictConfig(min_region_score=0.5))
    with pytest.raises(CheckpointError, match="is an exported model, which only `dcnseg predict`"):
        Predictor.from_checkpoint(folder / "uint8.onnx")
    monkeypatch.setattr("dcnseg.inference.onnx_network.select_device", torch.device)
    with pytest.raises(ConfigError, match=r"--device is mps, but the installed ONNX Runtime does"):
        Predictor.from_onnx(folder / "uint8.onnx", device="mps")


def test_files_that_are_no_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no\.onnx does not exist; expected an exported"):
        Predictor.from_onnx(tmp_path / "no.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"broken\.onnx cannot be opened by ONNX Runtime: "):
        Predictor.from_onnx(tmp_path / "broken.onnx")
    model = onnx.load(folder / "uint8.onnx")
    del model.graph.output[1]
    onnx.save(model, tmp_path / "labels.onnx")
    with pytest.raises(ConfigError, match=r"has the output labels, but .* --output labels,logits"):
        Predictor.from_onnx(tmp_path / "labels.onnx")
    model.metadata_props[0].value = "{"
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(CheckpointError, match=r"damaged\.onnx: its metadata is damaged"):
        Predictor.from_onnx(tmp_path / "damaged.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match=r"other\.onnx was not written by dcnseg"):
        Predictor.from_onnx(tmp_path / "other.onnx")
