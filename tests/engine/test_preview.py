from __future__ import annotations

from pathlib import Path

from dcnseg.data.image_io import read_image
from dcnseg.data.pairing.folders import find_splits
from dcnseg.engine.preview import CELL_WIDTH, GAP, write_preview
from dcnseg.inference.predictor import Predictor


def test_rows_of_image_mask_and_prediction(
    predictor: Predictor, scenes: Path, tmp_path: Path
) -> None:
    samples = find_splits(scenes).val
    write_preview(tmp_path / "preview.jpg", predictor, samples)
    height, width, _ = read_image(tmp_path / "preview.jpg").shape
    assert width == 3 * CELL_WIDTH + 2 * GAP
    assert height == 3 * (CELL_WIDTH * 64 // 96) + 2 * GAP
