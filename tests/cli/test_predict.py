from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.conftest import Invoke


def test_a_folder(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    result = invoke("predict", run, scenes / "val", "--out", tmp_path / "out", "--device=cpu")
    assert result.exit_code == 0, result.stderr
    labels = sorted((tmp_path / "out" / "labels").rglob("*.png"))
    # The masks beside the images are pictures too, and keep their place.
    assert {path.parent.name for path in labels} == {"images", "masks"}
    assert result.stdout.splitlines() == [
        str(tmp_path / "out" / "labels" / kind / f"scene_{i:04}.png")
        for kind in ("images", "masks")
        for i in range(3)
    ]
    assert len(list((tmp_path / "out" / "overlays").rglob("*.jpg"))) == 6
    with Image.open(labels[0]) as file:
        assert (file.mode, file.size) == ("P", (96, 64))


def test_a_list_on_stdin_as_json(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    pictures = sorted((scenes / "val" / "images").iterdir())
    result = invoke(
        "predict",
        run,
        "-",
        "--out",
        tmp_path,
        "--save=probabilities",
        "--json",
        "--device=cpu",
        stdin="".join(f"{path}\n" for path in pictures),
    )
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in pictures]
    for line in lines:
        assert line["error"] is None
        assert Path(line["outputs"]["probabilities"]).is_file()
        assert set(line["outputs"]) == {"probabilities"}


def test_a_broken_picture_is_3_and_the_rest_goes_on(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("<html>404</html>")
    good = scenes / "val" / "images"
    result = invoke("predict", run, broken, good, "--out", tmp_path / "out", "--device=cpu")
    assert result.exit_code == 3
    assert "broken.jpg" in result.stderr
    assert "3 of 4 pictures labelled" in result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_a_used_folder_is_refused(invoke: Invoke, run: Path, scenes: Path) -> None:
    result = invoke("predict", run, scenes, "--out", run)
    assert result.exit_code == 2
    assert "is not empty. Choose another folder or add --overwrite" in result.stderr


def test_no_pictures_is_3(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke("predict", run, tmp_path / "empty", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "no pictures in this folder" in result.stderr


def test_nothing_to_do_is_said(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("predict", run, "-", "--out", out, stdin="").exit_code == 3
    result = invoke("predict", run, scenes / "val/images", "--out", out, "--save", "")
    assert result.exit_code == 2
    assert "--save is empty" in result.stderr
    assert invoke("predict", run, scenes, "--out", out, "--amp=x").exit_code == 2
