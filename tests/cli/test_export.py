from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Invoke, require_onnx
from tests.export.small_network import save_small_weights
from tests.region_network import save_region_weights


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (
            "{tmp}/none --out m.onnx",
            1,
            "none does not exist; expected a run folder or weights file",
        ),
        ("{run} --out m.xml", 2, "--out is m.xml, but files of --format onnx end in .onnx"),
        (
            "{run} --out m.onnx --format tf",
            2,
            "--format is 'tf'; expected one of onnx, openvino, pt2",
        ),
        ("{run} --out m.onnx --input int8", 2, "--input is 'int8'; expected one of uint8, float"),
        ("{run} --out m.onnx --output ids", 2, "--output is 'ids'; expected one of labels, prob"),
        ("{run} --out m.onnx --output logits,logits", 2, "--output is 'logits,logits'; expected"),
        ("{run} --out m.onnx --output=", 2, "--output is ''; expected one or more of labels,"),
        ("{run} --out m.onnx --images {tmp}/no.png", 3, "no.png: does not exist"),
    ],
)
def test_errors(
    invoke: Invoke, run: Path, tmp_path: Path, arguments: str, code: int, text: str
) -> None:
    result = invoke("export", *arguments.format(run=run, tmp=tmp_path).split())
    assert result.exit_code == code
    assert text in result.stderr


def test_another_program_gets_the_parity_as_json(
    invoke: Invoke, images: list[Path], tmp_path: Path
) -> None:
    weights = save_region_weights(tmp_path / "regions.safetensors")
    out = tmp_path / "model.pt2"
    arguments = ("export", weights, "--out", out, "--format=pt2", "--output=logits", "--json")
    result = invoke(*arguments, "--images", images[0], "--images", images[1])
    assert result.exit_code == 0, result.stderr
    assert "the region head is not exported" in result.stderr
    content = json.loads(result.stdout)
    assert content["paths"] == [str(out)]
    assert content["parity"]["num_real_images"] == 2
    assert content["parity"]["max_logit_difference"] < 1e-3
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "model.pt2 exists. Choose another name or add --overwrite." in result.stderr


def test_an_onnx_model_is_used_like_its_run(
    invoke: Invoke, run: Path, onnx_model: Path, scenes: Path, tmp_path: Path
) -> None:
    """Predict and evaluate; the results are those of the run."""
    model = onnx_model
    options = ("--window=64", "--flip", "--device=cpu")
    for name, network in (("run", run), ("model", model)):
        out = tmp_path / name
        save = "--save=labels,overlay,confidence,probabilities"
        result = invoke("predict", network, scenes / "val", "--out", out, save, *options)
        assert result.exit_code == 0, result.stderr
        result = invoke("evaluate", network, scenes, "--out", out / "scores", *options)
        assert result.exit_code == 0, result.stderr
    for path in (tmp_path / "run" / "labels").rglob("*.png"):
        with Image.open(path) as file, Image.open(str(path).replace("/run/", "/model/")) as other:
            expected, found = np.asarray(file), np.asarray(other)
            assert file.getpalette() == other.getpalette()
        assert (expected == found).mean() > 0.999
    scores = [
        json.loads((tmp_path / name / "scores/scores.json").read_text())
        for name in ("run", "model")
    ]
    assert scores[1]["mean_iou"] == pytest.approx(scores[0]["mean_iou"], abs=1e-3)
    result = invoke("predict", model, scenes / "val", "--out", tmp_path / "no", "--amp=bf16")
    assert (result.exit_code, "exported models run in float32" in result.stderr) == (2, True)
    result = invoke("predict", model, scenes / "val", "--out", tmp_path / "no", "--save=regions")
    assert (result.exit_code, "An exported model has no region" in result.stderr) == (2, True)


def test_labels_only(invoke: Invoke, images: list[Path], tmp_path: Path) -> None:
    """The logits are compared, and then dropped."""
    require_onnx()
    weights = save_small_weights(tmp_path / "best.safetensors")
    model = tmp_path / "model.onnx"
    result = invoke("export", weights, "--out", model, "--output=labels")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{model}\n"
    assert "Compared on 6 random and 0 real images: largest difference of the " in result.stderr
    result = invoke("predict", model, images[0], "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "model.onnx has the output labels, but overlapping windows are" in result.stderr
