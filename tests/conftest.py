"""What several test files need: a small folder of generated scenes, and a run trained on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from dcnseg.api import export_model
from dcnseg.checkpoint import METADATA_KEY, find_weights
from dcnseg.config import DataConfig, ModelConfig, TrainConfig
from dcnseg.data.synthetic import write_scenes
from dcnseg.engine.training import train
from dcnseg.inference.predictor import Predictor
from dcnseg_cli.main import app

BROWSER = "chromium"
Invoke = Callable[..., Result]

SCENE_HW = (64, 96)


# Options of `dcnseg train` for a training that takes a few seconds.
SMALL_TRAINING = (
    *("--encoder=resnet18", "--encoder-weights=none", "--decoder-channels=16", "--crop-size=64"),
    *("--batch-size=4", "--epochs=1", "--workers=0", "--device=cpu", "--amp=off"),
)

# The same examples on every machine; `pytest --hypothesis-profile=search` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.register_profile("thorough", deadline=None, max_examples=5000)
settings.load_profile("same")


def small_config(scenes: Path, **changes: object) -> TrainConfig:
    """A training that takes a few seconds."""
    settings: dict[str, object] = {
        "data": DataConfig(scenes, crop_size=(64, 64), workers=0),
        "model": ModelConfig(encoder="resnet18", decoder_channels=16),
        "encoder_weights": "none",
        "epochs": 2,
        "batch_size": 4,
        "amp": "off",
        "device": "cpu",
        "lr": 0.02,
    }
    return TrainConfig(**(settings | changes))  # type: ignore[arg-type]


def rewrite_weights(
    weights: Path,
    path: Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    without: str = "",
) -> Path:
    """Copy a weights file, or a run's, with another header and other tensors, or `without` some."""
    weights = find_weights(weights)
    with safe_open(weights, framework="pt") as file:
        metadata = {METADATA_KEY: json.dumps(json.loads(file.metadata()[METADATA_KEY]) | header)}
    kept = load_file(weights) | dict(tensors or {})
    if without:
        kept = {name: tensor for name, tensor in kept.items() if without not in name}
    save_file(kept, path, metadata=metadata)
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 8 training, 3 validation and 2 test scenes."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=8, val=3, test=2, size_hw=SCENE_HW, seed=1)
    return root


@pytest.fixture
def images(scenes: Path) -> list[Path]:
    """The three validation images."""
    return sorted((scenes / "val" / "images").iterdir())


@pytest.fixture(scope="session")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two epochs; tests must not write to it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(small_config(scenes, ema=0.9), folder)
    return folder


def require_onnx() -> None:
    """Skip the test if the packages that export to ONNX are not installed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(scope="session")
def onnx_model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's network as an ONNX model."""
    require_onnx()
    path = tmp_path_factory.mktemp("models") / "model.onnx"
    export_model(run, path)
    return path


@pytest.fixture
def predictor(run: Path) -> Predictor:
    """The run's network on the CPU."""
    return Predictor.from_checkpoint(run, device="cpu")


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command line in this process; stdout and stderr are apart."""
    monkeypatch.delenv("DCNSEG_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    path = shutil.which(BROWSER)
    if path is None:
        pytest.skip(f"{BROWSER} is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=options)
        yield launched
        launched.close()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What checks remember stays out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers, and the CPU for "auto", on every machine."""
    torch.manual_seed(0)
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
