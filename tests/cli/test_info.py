from __future__ import annotations

import json
from pathlib import Path

import torch

from dcnseg import __version__
from dcnseg.ops import native_status
from tests.conftest import Invoke


def test_installation(invoke: Invoke) -> None:
    content = json.loads(invoke("info", "--json").stdout)
    assert content["dcnseg"] == __version__
    assert content["torch"] == torch.__version__
    assert content["native_operators"] == native_status()
    assert all(name.isidentifier() for name in content)
    assert f"torch: {torch.__version__}" in invoke("info").stdout


def test_run(invoke: Invoke, run: Path) -> None:
    content = json.loads(invoke("info", run, "--json").stdout)
    assert content["model"]["encoder"] == "resnet18"
    assert content["classes"]["1"] == "coral"
    assert content["scores"]["split"] == "val"
    seen = content["training_data"]
    assert (seen["num_images"], seen["gray_share"]) == (8, 0)
    assert seen["min_size_hw"] == seen["max_size_hw"] == [64, 96]
    text = invoke("info", run).stdout
    assert "training data:\n  num_images: 8\n  min_size_hw: [64, 96]" in text
