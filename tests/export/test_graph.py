from __future__ import annotations

import numpy as np
import pytest
import torch

from dcnseg.config import EXPORT_OUTPUTS
from dcnseg.data.class_map import ClassMap
from dcnseg.export.graph import ExportedNetwork
from tests.export.small_network import build_model, build_predictor, random_image


@pytest.mark.parametrize("input_scale", [1.0, 0.5])
def test_outputs_are_those_of_the_predictor(input_scale: float) -> None:
    predictor = build_predictor(input_scale)
    graph = ExportedNetwork(
        predictor.model, predictor.class_map, predictor.preprocessing, "uint8", EXPORT_OUTPUTS
    )
    image = random_image(61, 90)
    with torch.no_grad():
        labels, probabilities, logits = graph(torch.from_numpy(image)[None])
        expected_logits = predictor.model(predictor.prepare(image))
    expected = predictor.predict(image, with_probabilities=True)
    assert expected.probabilities is not None
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(probabilities[0], expected.probabilities, atol=2e-3)  # float16
    assert (labels[0].numpy() == expected.label_map).mean() > 0.999
    assert labels.dtype == torch.uint8
    assert 7 in labels.unique()  # an id that is not an index


def test_a_float_input_is_a_prepared_image() -> None:
    predictor = build_predictor(0.5)
    graph = ExportedNetwork(
        predictor.model, predictor.class_map, predictor.preprocessing, "float", ["logits", "labels"]
    )
    x = predictor.prepare(random_image(61, 90))
    with torch.no_grad():
        logits, labels = graph(x)
        assert torch.equal(logits, predictor.model(x))
    assert labels.shape == x.shape[:1] + x.shape[2:]


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [((0, 1, 2), torch.uint8), ((5, 0, 254), torch.uint8), ((0, 1, 300), torch.int32)],
)
def test_labels_are_class_ids(ids: tuple[int, ...], dtype: torch.dtype) -> None:
    class_map = ClassMap.from_values(ids)
    predictor = build_predictor()
    graph = ExportedNetwork(
        build_model(), class_map, predictor.preprocessing, "float", ["labels", "logits"]
    )
    with torch.no_grad():
        labels, logits = graph(torch.randn(2, 3, 40, 48))
    expected = class_map.decode_indices(logits.argmax(dim=1).numpy())
    assert labels.dtype == dtype
    assert (labels.numpy() == expected).all()
