"""The snippets of docs/python.md and of the README run, and their results are as described."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dcnseg
from dcnseg.config import TrainConfig

ROOT = Path(__file__).parents[1]
SMALL = {"encoder_weights": "none", "decoder_channels": 16, "batch_size": 4, "device": "cpu"}

pytestmark = pytest.mark.skipif(
    not hasattr(dcnseg, "Predictor"), reason="dcnseg.Predictor cannot be imported yet"
)


@pytest.fixture(autouse=True)
def _small_trainings(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data that the pages speak of; trainings take seconds."""
    shutil.copytree(scenes, tmp_path / "photos")
    shutil.copy(next((scenes / "val" / "images").iterdir()), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    api: Any = dcnseg
    train, resume = api.train, api.resume

    def small_train(data: Any, run: Any, **settings: Any) -> Any:
        if not isinstance(data, TrainConfig):
            return train(data, run, **(settings | SMALL | {"epochs": 1}))
        model = replace(data.model, decoder_channels=16)
        crops = replace(data.data, crop_size=(64, 64))
        return train(replace(data, data=crops, model=model, batch_size=4, device="cpu"), run)

    monkeypatch.setattr("dcnseg.train", small_train)
    monkeypatch.setattr("dcnseg.resume", lambda run, epochs: resume(run, epochs=2))


def run_snippets(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(compile(snippet, page, "exec"), names)
    return names


def test_readme() -> None:
    names = run_snippets("README.md")
    assert names["prediction"].label_map.shape == names["prediction"].overlay().shape[:2]


def test_python_page() -> None:
    names = run_snippets("docs/python.md")
    result, scores, prediction = names["result"], names["scores"], names["prediction"]
    height, width = names["image"].shape[:2]
    num_classes = len(prediction.class_names)
    assert result.run == Path("runs/photos")
    assert result.best_epoch == 1
    assert 0 <= result.scores["mean_iou"] <= 1
    assert set(result.class_iou) == set(prediction.class_names.values())
    assert 0 <= scores.mean_iou <= scores.pixel_accuracy <= 1
    assert set(np.unique(prediction.label_map)) <= set(prediction.class_names)
    assert set(prediction.colors) == set(prediction.class_names)
    for array, shape, dtype in (
        (prediction.label_map, (height, width), np.uint8),
        (prediction.color_mask, (height, width, 3), np.uint8),
        (prediction.overlay(), (height, width, 3), np.uint8),
        (prediction.confidence, (height, width), np.float16),
        (prediction.probabilities, (num_classes, height, width), np.float16),
    ):
        assert array.shape == shape
        assert array.dtype == dtype
    first, second = names["predictions"]
    assert np.array_equal(first.label_map, prediction.label_map)
    assert second.label_map.shape == (120, 160)
    assert second.confidence is None
