from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dcnseg.config import PredictConfig, Preprocessing
from dcnseg.errors import CheckpointError, ShapeError
from dcnseg.inference.predictor import Predictor


def picture(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (64, 96), (130, 75)])
def test_labels_have_the_pictures_size(predictor: Predictor, size: tuple[int, int]) -> None:
    prediction = predictor.predict(picture(*size))
    assert prediction.labels.shape == size
    assert prediction.labels.max() < predictor.class_map.num_classes
    assert prediction.probabilities is None


def test_probabilities_agree_with_labels(predictor: Predictor) -> None:
    prediction = predictor.predict(picture(64, 96), with_probabilities=True)
    assert prediction.probabilities is not None
    np.testing.assert_allclose(prediction.probabilities.sum(0, dtype=np.float32), 1, atol=5e-3)
    top = prediction.probabilities.max(0)
    chosen = np.take_along_axis(prediction.probabilities, prediction.labels[None].astype(int), 0)
    np.testing.assert_array_equal(chosen[0], top)


def test_windows_give_what_the_whole_picture_gives(predictor: Predictor) -> None:
    """With a network that looks at single pixels, where a window ends must not matter."""
    image = picture(160, 224)
    pointwise = torch.nn.Conv2d(3, predictor.class_map.num_classes, 1)
    results = [
        Predictor(
            pointwise,  # type: ignore[arg-type]
            predictor.class_map,
            Preprocessing(),
            device=torch.device("cpu"),
            config=PredictConfig(window=window, overlap=0.5, flip=True),
        ).predict(image, with_probabilities=True)
        for window in (256, 64)
    ]
    for whole, tiled in zip(*[r.probabilities for r in results], strict=True):
        np.testing.assert_allclose(tiled, whole, atol=1e-3)


def test_normalisation_and_scale_come_from_the_weights(predictor: Predictor) -> None:
    image = np.full((8, 8, 3), 51, np.uint8)
    halved = Predictor(
        predictor.model,
        predictor.class_map,
        Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.1, 0.1, 0.2), input_scale=0.5),
        device=torch.device("cpu"),
    )
    x = halved.prepare(image)
    assert x.shape == (1, 3, 4, 4)
    torch.testing.assert_close(x[0, :, 2, 2], torch.tensor([1.0, 0.0, -0.5]))
    assert halved.predict(image).labels.shape == (8, 8)


def test_bfloat16_agrees_with_float32(run: Path) -> None:
    image = picture(64, 96)
    labels = [
        Predictor.from_checkpoint(run, device="cpu", amp=amp).predict(image).labels
        for amp in ("off", "bf16")
    ]
    assert (labels[0] == labels[1]).mean() > 0.9


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_what_is_no_picture_is_refused(
    predictor: Predictor, image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> None:
    with pytest.raises(ShapeError, match=r"`image` is .*expected uint8 \[H, W, 3\]"):
        predictor.predict(image)


def test_missing_weights_are_never_made_up(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run folder"):
        Predictor.from_checkpoint(tmp_path / "run")
