from __future__ import annotations

from pathlib import Path, PurePath

import numpy as np
import pytest
from PIL import Image

from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.data.image_io import read_mask
from dcnseg.inference.prediction import Prediction
from dcnseg.inference.writers import get_output_paths, write_prediction

LABELS = np.array([[0, 1], [1, 1]], np.uint8)
IMAGE = np.zeros((2, 2, 3), np.uint8)


@pytest.mark.parametrize(("ids", "mode"), [((3, 255), "P"), ((7, 300), "I;16")])
def test_label_map_has_class_ids(ids: tuple[int, int], mode: str, tmp_path: Path) -> None:
    class_map = ClassMap(
        (ClassInfo(ids[0], "road", (1, 2, 3)), ClassInfo(ids[1], "tree", (4, 5, 6)))
    )
    paths = get_output_paths(tmp_path, PurePath("a/b"), ["labels"])
    write_prediction(Prediction(LABELS, class_map), IMAGE, paths)
    path = tmp_path / "labels" / "a" / "b.png"
    assert paths["labels"] == path
    assert read_mask(path).tolist() == [[ids[0], ids[1]], [ids[1], ids[1]]]
    with Image.open(path) as file:
        assert file.mode == mode


def test_failed_write_leaves_no_partial_file(tmp_path: Path) -> None:
    class_map = ClassMap((ClassInfo(0, "road", (1, 2, 3)), ClassInfo(1, "tree", (4, 5, 6))))
    (tmp_path / "labels").write_text("a file where the folder should be")
    paths = get_output_paths(tmp_path, PurePath("a"), ["labels", "overlay"])
    with pytest.raises(OSError, match="labels"):
        write_prediction(Prediction(LABELS, class_map), IMAGE, paths)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"labels", "a.jpg"}
