from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcnseg.inference.predictor import Predictor
from tests.conftest import Invoke


def test_a_data_folder(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    result = invoke("predict", run, scenes / "val", "--out", tmp_path / "out", "--device=cpu")
    assert result.exit_code == 0, result.stderr
    labels = sorted((tmp_path / "out" / "labels").rglob("*.png"))
    assert result.stdout.splitlines() == [
        str(tmp_path / "out" / "labels" / "images" / f"scene_{i:04}.png") for i in range(3)
    ]
    assert (
        f"using its 3 images, and skipping 3 masks in {scenes / 'val' / 'masks'}" in result.stderr
    )
    assert len(list((tmp_path / "out" / "overlays").rglob("*.jpg"))) == 3
    with Image.open(labels[0]) as file:
        assert (file.mode, file.size) == ("P", (96, 64))


def test_a_list_on_stdin_as_json(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    images = sorted((scenes / "val" / "images").iterdir())
    result = invoke(
        "predict",
        run,
        "-",
        "--out",
        tmp_path,
        "--save=probabilities",
        "--json",
        "--device=cpu",
        stdin="".join(f"{path}\n" for path in images),
    )
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in images]
    for line in lines:
        assert line["error"] is None
        assert Path(line["outputs"]["probabilities"]).is_file()
        assert set(line["outputs"]) == {"probabilities"}


def test_a_broken_image_is_3_and_the_rest_goes_on(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("<html>404</html>")
    good = scenes / "val" / "images"
    result = invoke("predict", run, broken, good, "--out", tmp_path / "out", "--device=cpu")
    assert result.exit_code == 3
    assert "broken.jpg" in result.stderr
    assert "Predicted 3 of 4 images" in result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_a_used_folder_is_refused(invoke: Invoke, run: Path, scenes: Path) -> None:
    result = invoke("predict", run, scenes, "--out", run)
    assert result.exit_code == 2
    assert "is not empty. Choose another folder or add --overwrite" in result.stderr


def test_no_images_is_3(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke("predict", run, tmp_path / "empty", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "no images in this folder" in result.stderr


def test_nothing_to_do_is_said(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("predict", run, "-", "--out", out, stdin="").exit_code == 3
    result = invoke("predict", run, scenes / "val/images", "--out", out, "--save", "")
    assert result.exit_code == 2
    assert "--save is empty" in result.stderr
    assert invoke("predict", run, scenes, "--out", out, "--amp=x").exit_code == 2


def test_skip_existing_goes_on_where_it_stopped(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    arguments = ("predict", run, scenes / "val/images", "--out", tmp_path, "--device=cpu")
    assert invoke(*arguments).exit_code == 0
    kept = tmp_path / "labels" / "scene_0000.png"
    kept.write_bytes(b"as it was")
    (tmp_path / "labels" / "scene_0001.png").unlink()
    (tmp_path / "overlays" / "scene_0002.jpg").unlink()
    assert invoke(*arguments).exit_code == 2
    result = invoke(*arguments, "--skip-existing", "--json")
    assert result.exit_code == 0, result.stderr
    assert "Predicted 2 of 3 images" in result.stderr
    assert "; 1 skipped because their outputs exist." in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["is_skipped"] for line in lines] == [True, False, False]
    assert lines[0]["outputs"]["labels"] == str(kept)
    assert kept.read_bytes() == b"as it was"
    assert len(list((tmp_path / "overlays").iterdir())) == 3
    result = invoke(*arguments, "--skip-existing")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "Predicted 0 of 3 images" in result.stderr
    result = invoke(*arguments, "--skip-existing", "--overwrite")
    assert result.exit_code == 2
    assert "--overwrite and --skip-existing cannot be combined" in result.stderr


def test_images_unlike_the_trainings_are_warned_about(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    with Image.open(next((scenes / "val" / "images").iterdir())) as photo:
        photo.load()
    for name, image in {
        "a_large": photo.resize((400, 300)),
        "b_tiny": photo.resize((20, 10)),
        "c_gray": photo.convert("L"),
        "d_gray": photo.convert("L"),
        "e_alike": photo.resize((80, 90)),
    }.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        image.save(tmp_path / "in" / f"{name}.png")
    out = tmp_path / "out"
    result = invoke("predict", run, tmp_path / "in", "--out", out, "--json", "--device=cpu")
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    expected = [["larger"], ["smaller"], ["gray"], ["gray"], []]
    assert [line["unlike_training"] for line in lines] == expected
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    unlike = [line for line in warnings if "every pixel" not in line]
    assert len(unlike) == 3
    assert "1 of 5 images is much larger than the training images (96x64)." in unlike[0]
    assert unlike[0].endswith("a_large.png (400x300).")
    assert "1 of 5 images is much smaller" in unlike[1]
    assert "2 of 5 images are gray, but all training images are in color" in unlike[2]
    assert f"Example: {tmp_path / 'in' / 'c_gray.png'} (" in unlike[2]


def rewritten(
    run: Path, path: Path, *, bias: float = 0, keep: int | None = None, **header: object
) -> Path:
    """A copy of a run's weights, changed.

    Args:
        run: The run folder.
        path: Where the copy goes.
        bias: Added to the head's second class.
        keep: How many tensors are kept.
        header: Parts of the description.
    """
    tensors = load_file(run / "best.safetensors")
    tensors["segmentation_head.0.bias"][1] += bias
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].numel())[:keep])
    with safe_open(run / "best.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["dcnseg"]) | header
    save_file(tensors, path, metadata={"dcnseg": json.dumps(description)})
    return path


def test_a_result_of_one_class_is_warned_about(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    weights = rewritten(run, tmp_path / "one.safetensors", bias=1e4)
    images = sorted((scenes / "val" / "images").iterdir())
    result = invoke("predict", weights, *images, "--out", tmp_path / "a", "--device=cpu")
    assert result.exit_code == 0, result.stderr
    text = "Warning: every pixel of all 3 images is 'snake', one of "
    assert text in result.stderr
    # One small image may well show one class.
    result = invoke("predict", weights, images[0], "--out", tmp_path / "b", "--device=cpu")
    assert "every pixel" not in result.stderr
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(tmp_path / "large.png")
    large = tmp_path / "large.png"
    result = invoke("predict", weights, large, "--out", tmp_path / "c", "--device=cpu")
    assert "every pixel of the image is 'snake'" in result.stderr


def test_weights_that_say_nothing_of_the_training_are_not_compared(
    invoke: Invoke, run: Path, tmp_path: Path
) -> None:
    weights = rewritten(run, tmp_path / "old.safetensors", training_data=None)
    Image.new("L", (400, 300)).save(tmp_path / "gray.png")
    result = invoke(
        *("predict", weights, tmp_path / "gray.png", "--out", tmp_path / "out"), "--device=cpu"
    )
    assert result.exit_code == 0, result.stderr
    assert "training images" not in result.stderr


def test_weights_of_other_classes_are_refused(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    classes = {"classes": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]}
    weights = rewritten(run, tmp_path / "other.safetensors", classes=classes)
    result = invoke("predict", weights, tmp_path, "--out", tmp_path / "out")
    assert result.exit_code in (1, 3)
    (tmp_path / "a.png").touch()
    result = invoke("predict", weights, tmp_path / "a.png", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "other.safetensors: its metadata has 2 classes and 16 decoder channels" in result.stderr


def test_memory_that_is_not_enough(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = Predictor.predict

    def greedy(self: Predictor, image: np.ndarray, **options: bool) -> object:
        if image.shape[0] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 PiB")
        return predict(self, image, **options)

    monkeypatch.setattr(Predictor, "predict", greedy)
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    small = next((scenes / "val" / "images").iterdir())
    arguments = (tmp_path / "a.png", small, "--out", tmp_path / "out", "--window=256")
    result = invoke("predict", run, *arguments, "--device=cpu")
    assert result.exit_code == 3
    text = "out of memory on cpu for an image of 300x200 pixels with --window 256. Use --wi"
    assert f"Error: {tmp_path / 'a.png'}: {text}ndow 128." in result.stderr
    assert "Predicted 1 of 2 images" in result.stderr


def test_any_damage_of_the_weights_is_one_line(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    whole = (run / "best.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    few_tensors = rewritten(run, tmp_path / "few.safetensors", keep=2).read_bytes()
    photo = next((scenes / "val" / "images").iterdir())
    choose = random.Random(5)
    damaged = [whole[: choose.randrange(len(whole))] for _ in range(2)]
    damaged += [few_tensors[: choose.randrange(len(few_tensors))] for _ in range(6)]
    for content, end in [(whole, header), (whole, len(whole)), *[(few_tensors, header)] * 24]:
        changed = bytearray(content)
        changed[choose.randrange(min(end, len(changed)))] ^= 1 << choose.randrange(8)
        damaged.append(bytes(changed))
    path = tmp_path / "damaged.safetensors"
    codes = set()
    for index, version in enumerate(damaged):
        path.write_bytes(version)
        out = tmp_path / str(index)
        result = invoke("predict", path, photo, "--out", out, "--device=cpu")
        codes.add(result.exit_code)
        assert isinstance(result.exception, SystemExit | None)
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == (result.exit_code != 0)
        assert all("damaged.safetensors" in line for line in errors)
        if errors:
            assert result.stderr.count("\n") == 1
            assert not out.exists()
    assert codes == {0, 1}


def test_a_full_disk_is_one_line_and_what_was_written_is_whole(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def save_until_full(photo: Image.Image, file: Any, *options: Any, **more: Any) -> None:
        if any(not path.name.startswith(".") for path in tmp_path.rglob("*.png")):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(photo, file, *options, **more)

    monkeypatch.setattr(Image.Image, "save", save_until_full)
    result = invoke(
        *("predict", run, scenes / "val/images", "--out", tmp_path / "out", "--save=labels"),
        "--device=cpu",
    )
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {tmp_path / 'out' / 'labels'}")
    assert result.stderr.splitlines()[-1].endswith(".png: No space left on device")
    (written,) = (tmp_path / "out").rglob("*.png")
    assert written.name.startswith("scene_000")
    with Image.open(written) as photo:
        photo.load()


def diverged(run: Path, path: Path) -> Path:
    """A copy of a run's weights, each finite, whose products overflow."""
    tensors = load_file(run / "best.safetensors")
    tensors["segmentation_head.0.weight"].fill_(3e38)
    with safe_open(run / "best.safetensors", framework="pt") as file:
        save_file(tensors, path, metadata=file.metadata())
    return path


def test_output_that_is_not_finite_names_the_image(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    weights = diverged(run, tmp_path / "bad.safetensors")
    images = sorted((scenes / "val" / "images").iterdir())[:2]
    result = invoke("predict", weights, *images, "--out", tmp_path / "out", "--device=cpu")
    assert (result.exit_code, result.stdout) == (3, "")
    for image in images:
        text = f"Error: {image}: the network's output has values that are not finite"
        assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_minimum_confidence(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    image = next((scenes / "val" / "images").iterdir())
    arguments = ("predict", run, image, "--out", tmp_path / "out", "--device=cpu", "--json")
    result = invoke(*arguments, "--save=labels,confidence", "--min-confidence=1")
    assert result.exit_code == 0, result.stderr
    line = json.loads(result.stdout)
    assert (line["class_shares"], line["share_below_min_confidence"]) == ({}, 1)
    with Image.open(line["outputs"]["labels"]) as file:
        assert file.getextrema() == (255, 255)
    with Image.open(line["outputs"]["confidence"]) as file:
        assert file.mode == "L"
    assert "no pixel reaches --min-confidence" in result.stderr
    assert invoke(*arguments, "--overwrite", "--min-confidence=2").exit_code == 2


def test_bad_images_of_every_kind_do_not_stop_the_others(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "film.mp4").touch()
    Image.new("RGB", (65501, 1)).save(tmp_path / "wide.png")
    good = next((scenes / "val" / "images").iterdir())
    url = "https://example.org//a.jpg"
    arguments = ("predict", run, tmp_path, url, good, "--out", tmp_path / "out", "--device=cpu")
    for _ in range(2):  # its own outputs are no input
        result = invoke(*arguments, "--overwrite")
        assert result.exit_code == 3
        for text in (
            f"{tmp_path}: skipped 1 .mp4 file (format not supported).",
            f"Skipped {tmp_path / 'fifo.png'}: not a regular file.",
            "loop.png: cannot be opened",
            f"Error: {url}: URLs are not supported; download the image first.",
            "Predicted 2 of 4 images",
        ):
            assert text in result.stderr


def test_an_unexpected_error_shows_its_traceback_on_request(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Predictor, image: np.ndarray, **options: bool) -> object:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(Predictor, "predict", fail)
    image = next((scenes / "val" / "images").iterdir())
    arguments = ("predict", run, image, "--out", tmp_path / "out", "--device=cpu")
    result = invoke(*arguments)
    assert result.exit_code == 3
    text = (
        f"{image}: unexpected error: ZeroDivisionError: odd (set DCNSEG_DEBUG=1 for the traceback)"
    )
    assert text in result.stderr
    monkeypatch.setenv("DCNSEG_DEBUG", "1")
    assert "Traceback" in invoke(*arguments).stderr
