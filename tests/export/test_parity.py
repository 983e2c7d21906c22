from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dcnseg.config import ExportConfig
from dcnseg.errors import ExportError
from dcnseg.export.graph import ExportedNetwork
from dcnseg.export.parity import Outputs, Runner, compare_outputs
from tests.export.small_network import build_predictor, random_image

CONFIG = ExportConfig(outputs=("labels", "probabilities", "logits"))


def make_runner(config: ExportConfig = CONFIG) -> Runner:
    """Run the graph without a file."""
    predictor = build_predictor(0.5)
    graph = ExportedNetwork(
        predictor.model,
        predictor.class_map,
        predictor.preprocessing,
        config.input,
        config.outputs,
    )

    @torch.no_grad()
    def run(image: np.ndarray) -> Outputs:
        results = graph(torch.from_numpy(image))
        return {name: value.numpy() for name, value in zip(config.outputs, results, strict=True)}

    return run


@pytest.mark.parametrize("config", [CONFIG, ExportConfig("onnx", "float", ("logits", "labels"))])
def test_equal_outputs(config: ExportConfig) -> None:
    sizes: list[tuple[int, ...]] = []
    run = make_runner(config)

    def record(image: np.ndarray) -> Outputs:
        sizes.append(image.shape)
        return run(image)

    images = [random_image(40, 52, seed) for seed in range(2)]
    parity = compare_outputs(record, build_predictor(0.5), config, images)
    assert parity.max_logit_difference < 1e-4
    assert parity.equal_labels >= 0.9999
    assert (parity.num_random_images, parity.num_real_images) == (6, 2)
    assert "6 random and 2 real images: largest difference of the logits" in parity.sentence()
    if config.input == "uint8":
        assert sizes[0] == (2, 128, 192, 3)
        assert sizes[3:] == [(1, 40, 52, 3), (1, 39, 51, 3)]
    else:
        assert sizes[1] == (2, 3, 97, 131)
        assert sizes[3] == (1, 3, 20, 26)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("logits", lambda values: values + 0.002, r"difference of the logits 0\.002"),
        ("logits", lambda values: values * np.float32("nan"), "expected a difference of at most"),
        (
            "probabilities",
            lambda values: values + 0.002,
            r"expected a difference of at most 0\.001",
        ),
        ("labels", lambda values: values + 1, r"equal labels 0\.0000 %"),
        ("labels", lambda values: values[:, 1:], r"returns labels \[127, 192\] for an image"),
    ],
)
def test_other_outputs_are_an_error(name: str, change: Any, text: str) -> None:
    run = make_runner()

    def run_changed(image: np.ndarray) -> Outputs:
        outputs = run(image)
        return {**outputs, name: change(outputs[name])}

    with pytest.raises(ExportError, match=text):
        compare_outputs(run_changed, build_predictor(0.5), CONFIG, [])
