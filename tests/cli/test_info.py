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
    assert content["native operators"] == native_status()
    assert f"torch: {torch.__version__}" in invoke("info").stdout


def test_run(invoke: Invoke, run: Path) -> None:
    content = json.loads(invoke("info", run, "--json").stdout)
    assert content["model"]["encoder"] == "resnet18"
    assert content["classes"]["1"] == "snake"
    assert content["scores"]["split"] == "val"


def test_what_is_no_run_is_named(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("info", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "nothing: no such run folder" in result.stderr
