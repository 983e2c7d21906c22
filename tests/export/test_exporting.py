"""Export as a whole; the files of each format are in the tests of their modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dcnseg.config import ExportConfig
from dcnseg.errors import ConfigError, ExportError
from dcnseg.export.exporting import ExportResult, export_network
from tests.export.small_network import random_image, save_small_weights
from tests.region_network import save_region_weights

PROGRAM = ExportConfig("pt2", "float", ("logits",))  # the fastest to export


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_small_weights(tmp_path / "best.safetensors")


def test_parity_and_files(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.pt2"
    result = export_network(weights, out, PROGRAM, [random_image(50, 71)])
    assert result.paths == (out,)
    assert list(out.parent.iterdir()) == [out]
    assert result.parity.max_logit_difference < 1e-3
    assert result.parity.num_real_images == 1
    assert not result.has_region_head


def test_region_heads_are_not_exported(tmp_path: Path) -> None:
    weights = save_region_weights(tmp_path / "regions.safetensors")
    result = export_network(weights, tmp_path / "model.pt2", PROGRAM)
    assert result.has_region_head


def test_a_model_that_differs_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcnseg.export.parity.MAX_DIFFERENCE", -1.0)
    out = tmp_path / "new" / "model.pt2"
    with pytest.raises(ExportError, match=r"the exported model differs from the network \(6 rand"):
        export_network(weights, out, PROGRAM)
    assert not list(out.parent.iterdir())


def test_the_logits_are_compared_even_if_they_are_no_output(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[tuple[str, ...]] = []
    original = ExportConfig("pt2", "float", ("labels",))

    def compare(_run: object, _predictor: object, config: ExportConfig, _images: object) -> str:
        exported.append(config.outputs)
        return f"parity {len(exported)}"

    monkeypatch.setattr("dcnseg.export.exporting.compare_outputs", compare)
    result = export_network(weights, tmp_path / "model.pt2", original)
    assert exported == [("labels", "logits"), ("labels",)]
    assert result == ExportResult((tmp_path / "model.pt2",), "parity 1", has_region_head=False)  # type: ignore[arg-type]


def test_names_of_files(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.onnx, but files of --format pt2 end in \.pt2"):
        export_network(weights, tmp_path / "model.onnx", PROGRAM)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.pt2 is a folder; expected a file"):
        export_network(weights, tmp_path / "folder.pt2", PROGRAM)
    (tmp_path / "file.pt2").touch()
    with pytest.raises(ConfigError, match=r"file\.pt2 exists\. Choose another name or add --over"):
        export_network(weights, tmp_path / "file.pt2", PROGRAM)


@pytest.mark.parametrize(
    ("config", "name", "package", "extra"),
    [
        (ExportConfig(), "model.onnx", "onnxscript", "onnx"),
        (ExportConfig("openvino"), "model.xml", "openvino", "openvino"),
    ],
)
def test_missing_packages(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: ExportConfig,
    name: str,
    package: str,
    extra: str,
) -> None:
    for each in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, each, sys)  # whether installed or not
    monkeypatch.setitem(sys.modules, package, None)
    text = rf'the package {package} is not installed.*pip install "dcnseg\[{extra}\]"'
    with pytest.raises(ConfigError, match=text):
        export_network(weights, tmp_path / name, config)
