from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePath

import pytest
from PIL import Image

from dcnseg.config import ModelConfig
from dcnseg.engine.training import train
from dcnseg.errors import ConfigError
from dcnseg.files import is_output_folder
from dcnseg.inference.inputs import InputImage
from dcnseg.visualize import run as visualize_run
from tests.conftest import Invoke, small_config


def test_images_and_numbers(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    image = sorted((scenes / "val" / "images").iterdir())[0]
    result = invoke(
        "visualize-offsets",
        run,
        image,
        "--out",
        tmp_path,
        "--point=10,20",
        "--point=90,60",
        "--device=cpu",
    )
    assert result.exit_code == 0, result.stderr
    written = [Path(line) for line in result.stdout.splitlines()]
    assert all(path.is_file() for path in written)
    assert len([path for path in written if path.suffix == ".png"]) == 3 * 2 + 2
    numbers = json.loads((tmp_path / f"{image.stem}.json").read_text())
    assert len(numbers["layers"]) == 3
    assert len(numbers["points"]) == 2


@pytest.mark.parametrize(
    ("point", "text"),
    [("500,20", "500"), ("5", "'5' is not X,Y"), ("a,b", "'a,b' is not a list of numbers")],
)
def test_wrong_points_are_named(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path, point: str, text: str
) -> None:
    out = tmp_path / "out"
    result = invoke("visualize-offsets", run, scenes / "val/images", "--out", out, "--point", point)
    assert result.exit_code == 2
    assert text in result.stderr
    assert not out.exists()


def test_a_broken_image_is_3(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    good = sorted((scenes / "val" / "images").iterdir())[0]
    result = invoke(
        "visualize-offsets", run, tmp_path / "broken.png", good, "--out", tmp_path / "out"
    )
    assert result.exit_code == 3
    assert "Visualized 1 of 2 images" in result.stderr


def test_a_plain_network_has_nothing_to_show(invoke: Invoke, scenes: Path, tmp_path: Path) -> None:
    model = ModelConfig(encoder="resnet18", decoder_channels=16, deform_layers=0)
    train(small_config(scenes, model=model, epochs=1), tmp_path / "run")
    result = invoke("visualize-offsets", tmp_path / "run", scenes, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "is a plain network without deformable layers" in result.stderr


@pytest.mark.parametrize("size", [(480, 31), (31, 480), (1, 1)])
def test_images_of_any_shape_are_drawn(
    invoke: Invoke, run: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("RGB", size, (90, 120, 30)).save(tmp_path / "image.png")
    result = invoke(
        "visualize-offsets",
        run,
        tmp_path / "image.png",
        "--out",
        tmp_path / "out",
        "--point=0,0",
        "--point=0,0",
        "--device=cpu",
    )
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3 * 2 + 1 + 1  # the same point is drawn once


def test_a_point_outside_one_of_several_images_stops_before_any_is_drawn(
    invoke: Invoke, run: Path, tmp_path: Path
) -> None:
    for name, size in (("a", (96, 64)), ("b", (20, 10))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    result = invoke("visualize-offsets", run, tmp_path, "--out", tmp_path / "out", "--point=50,30")
    assert result.exit_code == 2
    assert "b.png: The point 50,30 is outside the image of 20x10" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_huge_image_is_shown_to_the_network_smaller(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visualize_run, "MAX_NETWORK_PIXELS", 32 * 48)
    image = sorted((scenes / "val" / "images").iterdir())[0]
    result = invoke("visualize-offsets", run, image, "--out", tmp_path, "--point=90,60")
    assert result.exit_code == 0, result.stderr
    numbers = json.loads((tmp_path / f"{image.stem}.json").read_text())
    assert numbers["layers"][-1]["input_stride_px_yx"] == [32, 32]  # 16, at half the size


def test_a_folder_of_images_is_no_output_folder(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    image = shutil.copy(next((scenes / "val" / "images").iterdir()), tmp_path)
    out = tmp_path / "offsets"
    for _ in range(2):  # its own drawings are no input
        arguments = ("visualize-offsets", run, tmp_path, "--out", out, "--overwrite")
        result = invoke(*arguments, "--point=1,1", "--device=cpu")
        assert result.exit_code == 0, result.stderr
        assert "Visualized 1 of 1 images" in result.stderr
    assert is_output_folder(out)
    inputs = [InputImage(Path(image), PurePath("a"))]
    with pytest.raises(ConfigError, match=r"which contains files and is not marked"):
        list(visualize_run.visualize_files(run, inputs, tmp_path, device="cpu"))
    assert not is_output_folder(tmp_path)
