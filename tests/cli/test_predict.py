from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import Result

from dcnseg.inference.predictor import Predictor
from tests.conftest import Invoke, rewrite_weights
from tests.geotiff import random_bands, write_geotiff
from tests.region_network import save_region_weights

Predict = Callable[..., Result]
# Tensors of the head: only the second class, and finite numbers whose products overflow.
ONE_CLASS = {"segmentation_head.0.bias": torch.tensor([0, 1e4, 0, 0])}
OVERFLOWING = {"segmentation_head.0.weight": torch.full((4, 16, 1, 1), 3e38)}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def predict(invoke: Invoke, run: Path, out: Path) -> Predict:
    """Predict images on the CPU into the folder `out`."""

    def predict(*arguments: object, weights: Path = run, stdin: str | None = None) -> Result:
        return invoke("predict", weights, "--out", out, "--device=cpu", *arguments, stdin=stdin)

    return predict


def test_a_data_folder(predict: Predict, scenes: Path, out: Path) -> None:
    result = predict(scenes / "val")
    assert result.exit_code == 0, result.stderr
    labels = [out / "labels" / "images" / f"scene_{i:04}.png" for i in range(3)]
    assert result.stdout.splitlines() == [str(path) for path in labels]
    note = f"using its 3 images, and skipping 3 masks in {scenes / 'val' / 'masks'}"
    assert note in result.stderr
    assert len(list((out / "overlays").rglob("*.jpg"))) == 3
    with Image.open(labels[0]) as file:
        assert (file.mode, file.size) == ("P", (96, 64))


def test_a_list_on_stdin_as_json(predict: Predict, images: list[Path]) -> None:
    stdin = "".join(f"{path}\n" for path in images)
    result = predict("-", "--save=probabilities", "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in images]
    for line in lines:
        assert line["error"] is None
        assert Path(line["outputs"]["probabilities"]).is_file()
        assert set(line["outputs"]) == {"probabilities"}


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("{empty}", 3, "no images in this folder"),
        ("{empty}/*.jpg", 3, "*.jpg: no file matches"),
        ("-", 3, "the list on stdin is empty"),
        ("{image} --save=mask", 2, "--save is 'mask'; expected one or more of labels, overlay"),
        ("{image} --save=", 2, "--save is empty"),
        ("{image} --amp=x", 2, "--amp is 'x'"),
        ("{image} --min-confidence=2", 2, "--min-confidence is 2.0; expected"),
        ("{image} --min-region-score=2", 2, "--min-region-score is 2.0; expected"),
        ("{image} --min-region-score=0.1", 2, "This network has no region head, which scores"),
        ("{missing} --save=labels,regions", 2, "no region head, which scores regions (--save reg"),
        ("{image} --part=0/4", 2, "--part is '0/4'; expected K/N with K from 1 to N"),
        ("{image} --part=1/2 --out={image.parent}", 2, "is not empty. Choose another folder"),
        ("{image} --engine=spark", 2, "--engine is 'spark'; expected one of local, ray"),
        ("{image} --workers=2", 2, "--workers needs --engine ray"),
        ("{image} --out=nothing://a", 2, "nothing://a: cannot be opened (Protocol not known"),
        ("{image} --overwrite --skip-existing", 2, "--skip-existing cannot be combined"),
        (
            "{image} --out={image.parent}",
            2,
            "is not empty. Choose another folder or add --overwrite",
        ),
    ],
)
def test_errors(
    predict: Predict, images: list[Path], tmp_path: Path, arguments: str, code: int, text: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "missing": tmp_path / "no.png", "image": images[0]}
    words = arguments.format(**places).split()
    result = predict(*words, stdin="")
    assert result.exit_code == code
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_skip_existing_goes_on_where_it_stopped(predict: Predict, scenes: Path, out: Path) -> None:
    folder = scenes / "val/images"
    assert predict(folder).exit_code == 0
    kept = out / "labels" / "scene_0000.png"
    kept.write_bytes(b"as it was")
    (out / "labels" / "scene_0001.png").unlink()
    (out / "overlays" / "scene_0002.jpg").unlink()
    assert predict(folder).exit_code == 2
    result = predict(folder, "--skip-existing", "--json")
    assert result.exit_code == 0, result.stderr
    assert "Predicted 2 of 3 images" in result.stderr
    assert "; 1 skipped because their outputs exist." in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["is_skipped"] for line in lines] == [True, False, False]
    assert lines[0]["outputs"]["labels"] == str(kept)
    assert kept.read_bytes() == b"as it was"
    assert len(list((out / "overlays").iterdir())) == 3
    result = predict(folder, "--skip-existing")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "Predicted 0 of 3 images" in result.stderr


def test_parts_write_what_one_call_writes(
    predict: Predict, images: list[Path], tmp_path: Path, out: Path
) -> None:
    weights = save_region_weights(tmp_path / "regions.safetensors")
    arguments = (images[0].parent, "--save=labels,regions")
    results = [predict(*arguments, f"--part={k}/2", weights=weights) for k in (2, 1)]
    assert [result.exit_code for result in results] == [0, 0], results[1].stderr
    assert "Predicted 1 of 1 images" in results[0].stderr
    assert len(results[1].stdout.splitlines()) == 2
    result = predict(*arguments, "--part=1/2", weights=weights)
    assert result.exit_code == 2
    assert "4 outputs of part 1/2 exist, for example" in result.stderr
    result = predict(*arguments, "--part=1/2", "--skip-existing", weights=weights)
    assert (result.exit_code, result.stdout) == (0, "")
    assert predict(*arguments, "--part=4/4", weights=weights).exit_code == 0  # has no images
    parts = [json.loads((out / f"regions-{k}-of-2.json").read_text()) for k in (1, 2)]
    assert predict(*arguments, "--skip-existing", weights=weights).exit_code == 0
    found = {str(path.relative_to(out)): path for path in out.rglob("*.*") if path.is_file()}
    whole = tmp_path / "whole"
    assert predict(*arguments, "--out", whole, weights=weights).exit_code == 0
    for path in (path for path in whole.rglob("*") if path.is_file()):
        assert path.read_bytes() == found[str(path.relative_to(whole))].read_bytes()
    merged = json.loads((whole / "regions.json").read_text())
    together = [image for part in parts for image in part["images"]]
    assert sorted(together, key=lambda image: str(image["id"])) == merged["images"]


def test_urls_as_input_and_output(
    predict: Predict, scenes: Path, tmp_path: Path, out: Path
) -> None:
    weights = save_region_weights(tmp_path / "regions.safetensors")
    options = ("--save=labels,regions", "--json")
    local = predict(scenes / "val", *options, weights=weights)
    memory = fsspec.filesystem("memory")
    memory.put(str(scenes / "val"), "/in/val", recursive=True)
    memory.pipe("/in/val/images/broken.png", b"no image")
    arguments = ("memory://in/val", *options, "--out=memory://out")
    result = predict(*arguments, weights=weights)
    assert result.exit_code == 3
    assert "Error: memory://in/val/images/broken.png: is not an image" in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    expected = [json.loads(line) for line in local.stdout.splitlines()]
    for line, other in zip(lines[1:], expected, strict=True):  # after the broken one
        assert line["class_shares"] == other["class_shares"]
        for kind, url in line["outputs"].items():
            assert url == other["outputs"][kind].replace(str(out), "memory://out")
    label_map = "labels/images/scene_0000.png"
    assert memory.cat(f"/out/{label_map}") == (out / label_map).read_bytes()
    assert len(json.loads(memory.cat("/out/regions.json"))["images"]) == 3
    result = predict(*arguments, weights=weights)
    assert result.exit_code == 2
    assert "memory://out is not empty. Choose another folder or add --overwrite" in result.stderr
    memory.rm(f"/out/{label_map}")
    result = predict(*arguments, "--skip-existing", weights=weights)
    assert "Predicted 1 of 4 images in memory://out; 2 skipped" in result.stderr
    memory.rm("/", recursive=True)


def test_images_unlike_the_trainings_are_warned_about(
    predict: Predict, run: Path, images: list[Path], tmp_path: Path, out: Path
) -> None:
    with Image.open(images[0]) as photo:
        photo.load()
    (tmp_path / "in").mkdir()
    for name, image in {
        "a_large": photo.resize((400, 300)),
        "b_tiny": photo.resize((20, 10)),
        "c_gray": photo.convert("L"),
        "d_gray": photo.convert("L"),
        "e_alike": photo.resize((80, 90)),
    }.items():
        image.save(tmp_path / "in" / f"{name}.png")
    result = predict(tmp_path / "in", "--json")
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
    silent = rewrite_weights(run, tmp_path / "old.safetensors", {"training_data": None})
    result = predict(tmp_path / "in", "--overwrite", weights=silent)
    assert result.exit_code == 0, result.stderr
    assert "training images" not in result.stderr


def test_a_result_of_one_class_is_warned_about(
    predict: Predict, run: Path, images: list[Path], tmp_path: Path
) -> None:
    weights = rewrite_weights(run, tmp_path / "one.safetensors", {}, ONE_CLASS)
    result = predict(*images, weights=weights)
    assert result.exit_code == 0, result.stderr
    assert "Warning: every pixel of all 3 images is 'coral', one of " in result.stderr
    # One small image may well show one class.
    result = predict(images[0], "--overwrite", weights=weights)
    assert "every pixel" not in result.stderr
    Image.new("RGB", (256, 256)).save(tmp_path / "large.png")
    result = predict(tmp_path / "large.png", "--overwrite", weights=weights)
    assert "every pixel of the image is 'coral'" in result.stderr


def test_weights_of_other_classes_are_refused(
    predict: Predict, run: Path, images: list[Path], tmp_path: Path, out: Path
) -> None:
    classes = {"classes": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]}
    weights = rewrite_weights(run, tmp_path / "other.safetensors", {"classes": classes})
    result = predict(images[0], weights=weights)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "other.safetensors: its metadata has 2 classes and 16 decoder channels" in line
    assert not out.exists()


def test_memory_that_is_not_enough(
    predict: Predict, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Predictor.predict

    def greedy(self: Predictor, image: np.ndarray, **options: bool) -> object:
        if image.shape[0] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 PiB")
        return original(self, image, **options)

    monkeypatch.setattr(Predictor, "predict", greedy)
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    result = predict(tmp_path / "a.png", images[0], "--window=256")
    assert result.exit_code == 3
    text = "out of memory on cpu for an image of 300x200 pixels with --window 256. Use --wi"
    assert f"Error: {tmp_path / 'a.png'}: {text}ndow 128." in result.stderr
    assert "Predicted 1 of 2 images" in result.stderr


def test_a_full_disk_is_one_line_and_what_was_written_is_whole(
    predict: Predict, images: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def save_until_full(photo: Image.Image, file: Any, *options: Any, **more: Any) -> None:
        if any(not path.name.startswith(".") for path in out.rglob("*.png")):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(photo, file, *options, **more)

    monkeypatch.setattr(Image.Image, "save", save_until_full)
    result = predict(*images, "--save=labels")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: {out / 'labels'}")
    assert result.stderr.splitlines()[-1].endswith(".png: No space left on device")
    (written,) = out.rglob("*.png")
    assert written.name.startswith("scene_000")
    with Image.open(written) as photo:
        photo.load()


def test_output_that_is_not_finite_names_the_image(
    predict: Predict, run: Path, images: list[Path], tmp_path: Path, out: Path
) -> None:
    diverged = rewrite_weights(run, tmp_path / "bad.safetensors", {}, OVERFLOWING)
    result = predict(*images[:2], weights=diverged)
    assert (result.exit_code, result.stdout) == (3, "")
    for image in images[:2]:
        text = f"Error: {image}: the network's output has values that are not finite"
        assert text in result.stderr
    assert not out.exists()


def test_a_minimum_confidence(predict: Predict, images: list[Path]) -> None:
    result = predict(images[0], "--json", "--save=labels,confidence", "--min-confidence=1")
    assert result.exit_code == 0, result.stderr
    line = json.loads(result.stdout)
    assert (line["class_shares"], line["share_below_min_confidence"]) == ({}, 1)
    with Image.open(line["outputs"]["labels"]) as file:
        assert file.getextrema() == (255, 255)
    with Image.open(line["outputs"]["confidence"]) as file:
        assert file.mode == "L"
    assert "no pixel reaches --min-confidence" in result.stderr


def test_bad_images_of_every_kind_do_not_stop_the_others(
    predict: Predict, images: list[Path], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "film.mp4").touch()
    (tmp_path / "broken.jpg").write_text("<html>404</html>")
    Image.new("RGB", (65501, 1)).save(tmp_path / "wide.png")
    url = "nothing://host//a.jpg"
    for _ in range(2):  # its own outputs are no input
        result = predict(tmp_path, url, images[0], "--overwrite")
        assert result.exit_code == 3
        assert len(result.stdout.splitlines()) == 2
        for text in (
            f"{tmp_path}: skipped 1 .mp4 file (format not supported).",
            f"Skipped {tmp_path / 'fifo.png'}: not a regular file.",
            "loop.png: cannot be opened",
            "broken.jpg: is an HTML page",
            f"Error: {url}: cannot be opened (Protocol not known: nothing).",
            "Predicted 2 of 5 images",
        ):
            assert text in result.stderr


def test_an_unexpected_error_shows_its_traceback_on_request(
    predict: Predict, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: bool) -> object:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(Predictor, "predict", fail)
    result = predict(images[0])
    assert result.exit_code == 3
    text = "unexpected error: ZeroDivisionError: odd (set DCNSEG_DEBUG=1 for the traceback)"
    assert f"{images[0]}: {text}" in result.stderr
    monkeypatch.setenv("DCNSEG_DEBUG", "1")
    assert "Traceback" in predict(images[0]).stderr


def test_regions(predict: Predict, images: list[Path], tmp_path: Path, out: Path) -> None:
    weights = save_region_weights(tmp_path / "regions.safetensors")
    arguments = (*images, "--save=labels,overlay,regions", "--json")
    result = predict(*arguments, weights=weights)
    assert result.exit_code == 0, result.stderr
    for image, line in zip(images, map(json.loads, result.stdout.splitlines()), strict=True):
        assert line["outputs"] == {
            "labels": str(out / "labels" / f"{image.stem}.png"),
            "overlay": str(out / "overlays" / f"{image.stem}.jpg"),
            "regions": str(out / "regions" / f"{image.stem}.json"),
        }
        assert all(Path(path).is_file() for path in line["outputs"].values())
    written = json.loads((out / "regions.json").read_text())
    assert [image["file_name"] for image in written["images"]] == [str(path) for path in images]
    scores = [region["score"] for region in written["annotations"]]
    least = sorted(scores)[len(scores) // 2]
    result = predict(*arguments, "--overwrite", f"--min-region-score={least}", weights=weights)
    assert result.exit_code == 0, result.stderr
    kept = json.loads((out / "regions.json").read_text())["annotations"]
    assert {region["score"] for region in kept} <= {score for score in scores if score >= least}
    assert 0 < len(kept) < len(scores)
    (out / "regions" / f"{images[0].stem}.json").write_text("[")
    result = predict(*arguments, "--skip-existing", weights=weights)
    assert result.exit_code == 3
    assert f"{images[0].stem}.json: is not a file of regions (" in result.stderr


def test_help_has_the_options_of_regions(invoke: Invoke) -> None:
    text = " ".join(invoke("predict", "--help").stdout.replace("│", " ").split())
    assert "regions (JSON: COCO results; needs a network with a region head)" in text
    assert "OUT/regions.json has the regions of all images as a COCO data set" in text
    help_text = "Give regions with a score below this value (0 to 1) the most frequent class around"
    for command in ("predict", "evaluate"):
        text = " ".join(invoke(command, "--help").stdout.replace("│", " ").split())
        assert help_text in text


def test_bands(predict: Predict, out: Path, tmp_path: Path) -> None:
    image = write_geotiff(tmp_path / "land.tif", random_bands(5))
    result = predict(image, "--bands=4,3,2", "--save=labels,confidence")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [str(out / "labels" / "land.tif")]
    result = predict(image, "--bands=4,3,6", "--overwrite")
    assert result.exit_code == 3
    assert "land.tif: has 5 bands; --bands 4,3,6 needs band 6." in result.stderr
    for bands, text in (("1,x,2", "is not a list of integers"), ("1,2", "--bands is '1,2'; expec")):
        result = predict(image, f"--bands={bands}", "--overwrite")
        assert result.exit_code == 2
        assert text in result.stderr
