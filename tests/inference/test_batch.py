from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcnseg.data.image_io import read_image, read_mask
from dcnseg.errors import ConfigError
from dcnseg.inference.batch import predict_files
from dcnseg.inference.inputs import find_inputs
from dcnseg.inference.predictor import Predictor
from dcnseg.inference.writers import check_output_kinds, draw_overlay

KINDS = ("labels", "overlay", "probabilities")


def test_every_kind_of_output(predictor: Predictor, scenes: Path, tmp_path: Path) -> None:
    folder = scenes / "val" / "images"
    results = predict_files(predictor, find_inputs([str(folder)]), tmp_path, KINDS)
    assert [result.error for result in results] == [None] * 3
    for result in results:
        image = read_image(result.image.path)
        expected = predictor.predict(image, with_probabilities=True)
        ids = read_mask(result.outputs["labels"])
        np.testing.assert_array_equal(ids, np.array(predictor.class_map.ids)[expected.labels])
        with Image.open(result.outputs["labels"]) as file:
            assert file.mode == "P"
            colours = np.array(file.convert("RGB"))
        np.testing.assert_array_equal(colours, predictor.class_map.index_colours()[expected.labels])
        assert read_image(result.outputs["overlay"]).shape == image.shape
        with np.load(result.outputs["probabilities"]) as archive:
            np.testing.assert_array_equal(archive["probabilities"], expected.probabilities)
            assert tuple(archive["names"]) == predictor.class_map.names
        assert sum(result.class_shares.values()) == pytest.approx(1, abs=1e-4)


def test_a_broken_picture_does_not_stop_the_others(
    predictor: Predictor, scenes: Path, tmp_path: Path
) -> None:
    good = sorted((scenes / "val" / "images").iterdir())
    broken = tmp_path / "broken.png"
    broken.write_bytes(good[0].read_bytes()[:200])
    inputs = find_inputs([str(broken), "missing.png", *map(str, good)])
    seen: list[str] = []
    results = predict_files(
        predictor,
        inputs,
        tmp_path / "out",
        ("labels",),
        on_result=lambda result: seen.append(result.image.path.name),
    )
    assert seen == [image.path.name for image in inputs]
    assert "broken.png" in str(results[0].error)
    assert "missing.png" in str(results[1].error)
    assert [result.error for result in results[2:]] == [None] * 3
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {path.with_suffix(".png").name for path in good}


def test_overlay_lays_the_classes_colours_over_the_picture(predictor: Predictor) -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    labels = np.array([[0, 1, 255]], np.uint8)
    overlay = draw_overlay(image, labels, predictor.class_map)
    colours = predictor.class_map.index_colours()
    np.testing.assert_allclose(overlay[0, 0], 45 + 0.55 * colours[0], atol=1)
    np.testing.assert_allclose(overlay[0, 1], 45 + 0.55 * colours[1], atol=1)
    np.testing.assert_array_equal(overlay[0, 2], 100)


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="--save is 'mask'; expected some of labels, overlay"):
        check_output_kinds(["labels", "mask"])
