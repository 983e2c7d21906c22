"""The snippets of the README and of pages of docs/ run, as described there."""

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
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import read_run
from tests.geotiff import random_bands, write_geotiff

ROOT = Path(__file__).parents[1]
SMALL = {"encoder_weights": "none", "decoder_channels": 16, "batch_size": 4, "device": "cpu"}


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
        small = replace(data, data=crops, model=model, batch_size=4, device="cpu")
        return train(small, run, **settings)

    monkeypatch.setattr("dcnseg.train", small_train)
    monkeypatch.setattr("dcnseg.resume", lambda run, epochs, **more: resume(run, epochs=2, **more))


def run_snippets(page: str, word: str = "") -> dict[str, Any]:
    """Run the snippets of a page that contain a word."""
    names: dict[str, Any] = {"__name__": "mine"}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        if word in snippet:
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
    with_regions = names["with_regions"]
    assert with_regions.region_numbers.max() == len(with_regions.regions)


def test_training_page() -> None:
    """A resumed run continues with its augmentation."""
    run_snippets("docs/training.md")
    run = Path("runs/augmented")
    assert [record["epoch"] for record in read_metrics(run)] == [1, 2]
    assert read_run(run).config.augment == "mine.augment"


def test_huge_images_of_the_deployment_page(run: Path) -> None:
    write_geotiff(Path("satellite.tif"), random_bands(5))
    shutil.copytree(run, "runs/photos")
    names = run_snippets("docs/deployment.md", "open_raster")
    assert sum(names["summary"].class_shares.values()) == pytest.approx(1, abs=1e-5)
    assert {path.name for path in Path("land").iterdir()} == {"labels.tif", "overlay.jpg"}
