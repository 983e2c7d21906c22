from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from dcnseg.data.image_io import write_png
from dcnseg.files import mark_output_folder
from dcnseg.inference.inputs import find_inputs
from tests.conftest import SMALL_TRAINING, Invoke
from tests.data.helpers import touch

HALVES = np.repeat(np.array([[0, 255]], np.uint8), 32, axis=1).repeat(40, axis=0)


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """Four pairs whose masks are 0 and 255, and no class list."""
    return write_pairs(tmp_path / "two classes", "images/{}.png", "masks/{}.png")


def write_pairs(root: Path, image: str, mask: str) -> Path:
    noise = np.random.default_rng(0)
    for index in range(4):
        write_png(root / image.format(index), noise.integers(0, 256, (40, 64, 3), np.uint8))
        write_png(root / mask.format(index), HALVES)
    return root


def test_clean_data_is_shown_and_0(invoke: Invoke, scenes: Path) -> None:
    result = invoke("check", scenes)
    assert result.exit_code == 0
    assert "8 train, 3 val, 2 test" in result.stdout
    assert "96x64 (13)" in result.stdout
    assert "amber" in result.stdout
    assert "%" not in result.stdout  # shares are fractions, as scores are
    assert re.search(r"background +│ +0\.\d{4} +│ +1\.0000 ", result.stdout)
    assert "error" not in result.stdout
    assert result.stderr == ""


def test_json_is_one_object(invoke: Invoke, scenes: Path) -> None:
    result = invoke("check", scenes, "--json", "--workers", 1)
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content["is_clean"] is True
    assert content["splits"] == {"train": 8, "val": 3, "test": 2}
    assert sum(entry["pixel_share"] for entry in content["classes"]) == pytest.approx(1)
    assert content["suggestion"]["crop_size"] == [64, 96]


def test_all_errors_are_shown_and_3(invoke: Invoke, binary: Path, tmp_path: Path) -> None:
    (binary / "images" / "0.png").write_bytes(b"")
    write_png(binary / "masks" / "1.png", HALVES[:9])
    write_png(binary / "masks" / "alone.png", HALVES)
    result = invoke("check", binary)
    assert result.exit_code == 3
    assert "3 errors" in result.stdout
    assert "images/0.png: is empty." in result.stdout
    assert "masks/1.png: is 64x9 pixels" in result.stdout
    assert "masks/alone.png: has no image." in result.stdout
    assert "Next step, once the errors are fixed:" in result.stdout
    content = json.loads(invoke("check", binary, "--json").stdout)
    assert [finding["severity"] for finding in content["findings"]].count("error") == 3
    result = invoke("train", binary, "--out", tmp_path / "run")
    assert result.exit_code == 3
    assert "Found 3 problems in the dataset:" in result.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_data_that_is_not_recognized_is_3(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("check", tmp_path / "cvv")
    assert result.exit_code == 3
    assert result.stderr.startswith(f"Error: {tmp_path / 'cvv'}: does not exist; expected a folder")
    (tmp_path / "a.mp4").touch()
    result = invoke("check", tmp_path)
    assert result.exit_code == 3
    assert "Skipped: a.mp4 (a video; convert it to PNG or JPEG)." in result.stderr
    result = invoke("check", tmp_path, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["findings"][0]["kind"] == "layout"


def test_write_classes_writes_once(invoke: Invoke, binary: Path) -> None:
    result = invoke("check", binary, "--write-classes")
    assert result.exit_code == 0
    path = binary / "classes.json"
    assert result.stderr == f"Wrote {path}.\n"
    entries = json.loads(path.read_text())["classes"]
    assert [(entry["id"], entry["name"]) for entry in entries] == [
        (0, "background"),
        (255, "foreground"),
    ]
    before = path.read_bytes()
    result = invoke("check", binary, "--write-classes")
    assert result.stderr == f"{path} exists and is not changed.\n"
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in binary.iterdir()) == ["classes.json", "images", "masks"]


def test_patterns_find_the_files_and_stand_in_the_command(invoke: Invoke, tmp_path: Path) -> None:
    write_pairs(tmp_path, "x/{}.png", "y/m{}.png")
    options = ["--images", "x/{stem}.png", "--masks", "y/m{stem}.png"]
    result = invoke("check", tmp_path, *options)
    assert result.exit_code == 0
    assert shlex.join(options) in result.stdout


def test_the_command_that_is_suggested_trains(
    invoke: Invoke, binary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    command = json.loads(invoke("check", binary, "--json").stdout)["suggestion"]["command"]
    result = invoke(*shlex.split(command)[1:], *SMALL_TRAINING)
    assert result.exit_code == 0, result.stderr
    assert "Warning: " in result.stderr
    assert "only the values 0 and 255, which are interpreted as background" in result.stderr


def test_what_predict_wrote_is_neither_mask_nor_input(
    invoke: Invoke, scenes: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(scenes / "val" / "images", photos)
    out = photos / "predictions"
    touch(photos, "film.mp4", "predictions/labels/scene_0000.png")
    mark_output_folder(out)
    assert len(find_inputs([str(photos)])) == 3
    result = invoke("check", photos)
    assert result.exit_code == 3
    assert "1 error\n" in result.stdout
    assert f"  {photos}: has no masks, only 3 images. To label these with" in result.stdout
    assert f"use `dcnseg predict RUN {photos} --out OUT`. To train on them" in result.stdout
    assert "go on with" not in result.stdout
    rows = [line for line in result.stdout.splitlines() if "skipped" in line]
    assert f"1: {photos / 'film.mp4'} (a video; convert it to PNG or JPEG" in rows[0]
    assert f"1: {out} (written by dcnseg, it contains .dcnseg-output)" in rows[1]
    assert "other files" not in result.stdout
    content = json.loads(invoke("check", photos, "--json").stdout)
    assert [entry["file"] for entry in content["skipped"]] == [str(photos / "film.mp4"), str(out)]
    assert len(content["images_without_mask"]) == 3
    result = invoke("train", photos, "--out", tmp_path / "run")
    assert result.exit_code == 3
    assert f"Error: {photos}: has no masks, only 3 images." in result.stderr


def test_a_class_list_in_the_folder_above_is_pointed_out(
    invoke: Invoke, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (binary.parent / "classes.json").write_text('{"classes": [{"id": 0, "name": "a"}]}')
    result = invoke("check", binary)
    assert result.exit_code == 0
    above = binary.parent / "classes.json"
    warning = f"{binary}: has no class list, and {above} in the parent folder is not read."
    assert f"{warning} Pass {binary.parent} as DATA, or copy" in result.stdout
    monkeypatch.chdir(binary)
    assert "classes.json in the parent folder is not read" in invoke("check", ".").stdout
    shutil.copy(binary.parent / "classes.json", binary)
    assert "folder above" not in invoke("check", binary).stdout


def test_ignored_values_add_up(invoke: Invoke, binary: Path) -> None:
    given = ("--ignore-index=8", "--ignore-index", "3,4", "--ignore-index=8,12", "--json")
    suggestion = json.loads(invoke("check", binary, *given).stdout)["suggestion"]
    assert "--ignore-index 8,3,4,12" in suggestion["command"]
    assert invoke("check", binary, "--ignore-index=8", "--ignore-index=x").exit_code == 2
