from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.config import PredictConfig, Preprocessing
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.dataset import scaled_size_hw
from dcnseg.errors import ConfigError, NotFiniteError, ShapeError
from dcnseg.inference import predictor as predictor_module
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.sliding_window import (
    compute_blending_weights,
    compute_window_starts,
    predict_strips,
)
from tests.tiny_network import tiny_predictor

CPU = torch.device("cpu")


def photo(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (64, 96), (130, 75)])
def test_labels_have_the_size_of_the_image(predictor: Predictor, size: tuple[int, int]) -> None:
    prediction = predictor.predict(photo(*size))
    assert prediction.labels.shape == size
    assert prediction.labels.max() < predictor.class_map.num_classes
    assert prediction.probabilities is None


def test_prepare_normalizes_and_scales(predictor: Predictor) -> None:
    image = np.full((8, 8, 3), 51, np.uint8)
    preprocessing = Preprocessing((0.1, 0.2, 0.3), (0.1, 0.1, 0.2), input_scale=0.5)
    halved = Predictor(predictor.model, predictor.class_map, preprocessing, device=CPU)
    x = halved.prepare(image)
    assert x.shape == (1, 3, 4, 4)
    torch.testing.assert_close(x[0, :, 2, 2], torch.tensor([1.0, 0.0, -0.5]))
    assert halved.predict(image).labels.shape == (8, 8)


def test_bfloat16_agrees_with_float32(run: Path) -> None:
    image = photo(64, 96)
    labels = [
        Predictor.from_checkpoint(run, device="cpu", amp=amp).predict(image).labels
        for amp in ("off", "bf16")
    ]
    assert (labels[0] == labels[1]).mean() > 0.9


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_wrong_image_is_an_error(
    predictor: Predictor, image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> None:
    with pytest.raises(ShapeError, match=r"`image` is .*expected uint8 \[H, W, 3\]"):
        predictor.prepare(image)


@torch.inference_mode()
def predict_whole_windows(
    predictor: Predictor, image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> Tensor:
    """Oracle without strips: upsamples whole windows, then blends them to [K, H, W]."""
    config, (height, width) = predictor.config, image.shape[:2]
    side = max(1, round(config.window / predictor.preprocessing.input_scale))
    window_h, window_w = min(side, height), min(side, width)
    weights = compute_blending_weights(window_h)[:, None] * compute_blending_weights(window_w)
    total = torch.zeros(predictor.class_map.num_classes, height, width)
    norm = torch.zeros(height, width)
    for top in compute_window_starts(height, window_h, config.overlap):
        for left in compute_window_starts(width, window_w, config.overlap):
            rows, columns = slice(top, top + window_h), slice(left, left + window_w)
            x = predictor.prepare(image[rows, columns])
            views = []
            for is_flipped in (False, True) if config.flip else (False,):
                for scale in config.scales:
                    view = x.flip(-1) if is_flipped else x
                    size = scaled_size_hw(x.shape[-2:], scale)
                    if scale != 1:
                        view = F.interpolate(view, size=size, mode="bilinear", antialias=True)
                    probabilities = predictor.model(view).softmax(dim=1)
                    probabilities = F.interpolate(probabilities, x.shape[-2:], mode="bilinear")
                    views.append(probabilities.flip(-1) if is_flipped else probabilities)
            mean = torch.stack(views).mean(dim=0)
            values = F.interpolate(mean, size=(window_h, window_w), mode="bilinear")[0]
            total[:, rows, columns] += values * weights
            norm[rows, columns] += weights
    return total / norm


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([1, 2, 11, 150]),
    st.sampled_from([0.25, 0.5, 1.0, 1.7]),
    st.sampled_from([0.0, 0.25, 0.6, 0.75]),
    st.booleans(),
    st.sampled_from([(1.0,), (0.5, 1.0, 1.5), (0.75,)]),
    st.sampled_from([1, 4, 8]),
    st.integers(10, 16),
)
def test_strips_equal_whole_windows(
    height: int,
    width: int,
    num_classes: int,
    input_scale: float,
    overlap: float,
    flip: bool,
    scales: tuple[float, ...],
    upsampling: int,
    strip_values: int,
) -> None:
    config = PredictConfig(window=64, overlap=overlap, flip=flip, scales=scales)
    predictor = tiny_predictor(num_classes, config, input_scale, upsampling)
    image = photo(height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(predictor_module.STRIP_VALUES, "cpu", 1 << strip_values)
        prediction = predictor.predict(image, with_confidence=True, with_probabilities=True)
    expected = predict_whole_windows(predictor, image)
    assert prediction.probabilities is not None
    assert prediction.confidence is not None
    np.testing.assert_allclose(prediction.probabilities, expected, atol=6e-4)
    np.testing.assert_allclose(prediction.confidence, expected.amax(0), atol=6e-4)
    chosen = expected.gather(0, torch.from_numpy(prediction.labels).long()[None])[0]
    torch.testing.assert_close(chosen, expected.amax(0), atol=1e-5, rtol=0)  # ties apart


def test_strips_have_a_limited_height(monkeypatch: pytest.MonkeyPatch) -> None:
    heights = []

    def record(*arguments: Any, **options: Any) -> Iterator[tuple[int, Tensor]]:
        for top, strip in predict_strips(*arguments, **options):
            heights.append(strip.shape[1])
            yield top, strip

    monkeypatch.setattr(predictor_module, "predict_strips", record)
    monkeypatch.setitem(predictor_module.STRIP_VALUES, "cpu", 11 * 100 * 5)
    tiny_predictor(11, PredictConfig(window=64)).predict(photo(300, 100))
    assert max(heights) == 5
    assert sum(heights) == 300


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_output_that_is_not_finite_is_an_error(value: float) -> None:
    """Includes finite weights that overflow; argmax would turn NaN into class 0."""
    predictor = tiny_predictor(3, PredictConfig(window=64))
    with torch.no_grad():
        predictor.model.segmentation_head[0].weight.fill_(value)  # type: ignore[index]
        predictor.model.segmentation_head[0].bias.fill_(value)  # type: ignore[index]
    with pytest.raises(NotFiniteError, match=r"not finite \(NaN or infinity\)\. The weights are"):
        predictor.predict(photo(100, 80))
    predictor.amp_dtype = torch.float16
    with pytest.raises(NotFiniteError, match="Use --amp bf16 or off instead of fp16"):
        predictor._check_finite(torch.tensor(float("inf")))


@pytest.mark.parametrize(
    ("ids", "ignored", "expected"),
    [
        ((0, 255), (), [[0, 255]]),
        ((7, 300), (), [[7, 300]]),
        ((3, 4), (), [[3, 4]]),
        ((0, 255), (9,), [[0, 255, 9]]),
        ((3, 4), (9,), [[3, 4, 255]]),
    ],
)
def test_label_map_has_class_ids(
    ids: tuple[int, ...], ignored: tuple[int, ...], expected: list[list[int]]
) -> None:
    class_map = ClassMap(
        tuple(ClassInfo(i, f"c{i}", (i % 256, 0, 0)) for i in ids),
        tuple(ClassInfo(i, f"i{i}", (0, 0, 0)) for i in ignored),
    )
    labels = np.array([[0, 1, 255][: len(expected[0])]], np.uint8)
    label_map = Prediction(labels, class_map).label_map
    assert label_map.tolist() == expected
    assert label_map.dtype == (np.uint16 if max(ids) > 255 else np.uint8)


def test_min_confidence_needs_an_unused_id() -> None:
    model = tiny_predictor(2, PredictConfig()).model
    config = PredictConfig(min_confidence=0.5)
    with pytest.raises(ConfigError, match=r"255 is a class, and no id is ignored"):
        Predictor(model, ClassMap.binary(255), Preprocessing(), device=CPU, config=config)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"--min-confidence is .*; expected at least 0"):
            PredictConfig(min_confidence=value)
