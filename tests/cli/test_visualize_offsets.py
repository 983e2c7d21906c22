from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePath

import pytest
import torch
from PIL import Image
from typer.testing import Result

from dcnseg.checkpoint import save_weights
from dcnseg.config import ModelConfig, Preprocessing
from dcnseg.data.synthetic import SCENE_CLASSES
from dcnseg.errors import ConfigError, NotFiniteError
from dcnseg.files import is_output_folder
from dcnseg.inference.inputs import InputImage
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import build_segmenter
from dcnseg.visualize import offsets
from dcnseg.visualize import run as visualize_run
from dcnseg.visualize.explorer.run import explore_files
from tests.conftest import Invoke, rewrite_weights

Visualize = Callable[..., Result]


@pytest.fixture
def visualize(invoke: Invoke, run: Path, tmp_path: Path) -> Visualize:
    """Draw images on the CPU into the folder `out`."""
    out = tmp_path / "out"
    return lambda *given: invoke("visualize-offsets", run, *given, "--out", out, "--device=cpu")


def test_images_and_numbers(visualize: Visualize, images: list[Path], tmp_path: Path) -> None:
    result = visualize(images[0], "--point=10,20", "--point=90,60")
    assert result.exit_code == 0, result.stderr
    written = [Path(line) for line in result.stdout.splitlines()]
    assert all(path.is_file() for path in written)
    stem = images[0].stem
    assert [str(path.relative_to(tmp_path / "out")) for path in written] == [
        f"{stem}.png",
        *(f"{stem}/{name}.png" for name in ("dilation", "flow", "points", "point_10_20")),
        f"{stem}/point_90_60.png",
        f"{stem}/offsets.json",
    ]
    numbers = json.loads((tmp_path / "out" / stem / "offsets.json").read_text())
    assert len(numbers["layers"]) == 3
    assert len(numbers["points"]) == 2


@pytest.mark.parametrize(
    ("point", "text"),
    [
        ("5", "'5' is not X,Y"),
        ("a,b", "'a,b' is not a list of numbers"),
        ("50,30", "b.png: The point 50,30 is outside the image of 20x10"),
    ],
)
def test_wrong_points_stop_before_any_image_is_drawn(
    visualize: Visualize, images: list[Path], tmp_path: Path, point: str, text: str
) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "b.png")
    result = visualize(images[0], tmp_path / "b.png", "--point", point)
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_3(visualize: Visualize, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    result = visualize(tmp_path / "broken.png", images[0])
    assert result.exit_code == 3
    assert "Visualized 1 of 2 images" in result.stderr


def test_a_plain_network_has_nothing_to_show(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    model = {"encoder": "resnet18", "decoder_channels": 16, "deform_layers": 0}
    path = tmp_path / "plain.safetensors"
    weights = rewrite_weights(run, path, {"model": model}, without="conv_offset")
    result = invoke("visualize-offsets", weights, scenes, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "is a plain network without deformable layers" in result.stderr


def test_a_network_beside_in_both_formats_and_an_animation(
    visualize: Visualize, images: list[Path], invoke: Invoke, run: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.safetensors"
    model = {"encoder": "resnet18", "decoder_channels": 16, "deform_layers": 0}
    rewrite_weights(run, plain, {"model": model}, without="conv_offset")
    options = ("--point=9,9", "--compare", plain, "--format=both", "--animate", "--frames=2")
    result = visualize(images[0], *options)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "out" / images[0].stem
    assert len(result.stdout.splitlines()) == 2 * 5 + 2
    assert f"what {run.name} and plain see" in folder.with_suffix(".svg").read_text()
    with Image.open(folder / "animation.webp") as animation:
        assert animation.n_frames == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--format=pdf",), "--format is 'pdf'; expected png, svg, both"),
        (("--animate", "--frames=601"), "--frames is 601; expected 1 to 600"),
        (("--animate", "--frames=0"), "--frames is 0; expected 1 to 600"),
    ],
)
def test_wrong_options(
    visualize: Visualize, images: list[Path], tmp_path: Path, options: tuple[str, ...], text: str
) -> None:
    result = visualize(images[0], *options)
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_points_of_the_prediction_are_the_default(
    invoke: Invoke, images: list[Path], tmp_path: Path
) -> None:
    weights = save_network(tmp_path / "head.safetensors", "none")
    result = invoke("visualize-offsets", weights, images[0], "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    (path,) = (tmp_path / "out").rglob("point_*.png")  # one object of 96x64 pixels
    x, y = map(int, path.stem.split("_")[1:])
    assert min(x, 95 - x) >= 30
    assert y in (31, 32)


def test_offsets_of_a_network_whose_output_is_not_finite(
    visualize: Visualize, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotFiniteError("NaN")

    monkeypatch.setattr(Predictor, "predict", fail)
    result = visualize(images[0], "--point=9,9", "--format=svg")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / f"{images[0].stem}.svg").read_text()
    assert "No prediction: the output is not finite" in text


@pytest.mark.parametrize("size", [(480, 31), (31, 480), (1, 1)])
def test_images_of_any_shape_are_drawn(
    visualize: Visualize, tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("RGB", size, (90, 120, 30)).save(tmp_path / "image.png")
    result = visualize(tmp_path / "image.png", "--point=0,0", "--point=0,0")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 4 + 1 + 1  # the same point is drawn once


def test_a_huge_image_is_shown_to_the_network_smaller(
    visualize: Visualize, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offsets, "MAX_NETWORK_PIXELS", 32 * 48)
    result = visualize(images[0], "--point=90,60")
    assert result.exit_code == 0, result.stderr
    numbers = json.loads((tmp_path / "out" / images[0].stem / "offsets.json").read_text())
    assert numbers["layers"][-1]["input_stride_px_yx"] == [32, 32]  # 16, at half the size


def test_a_folder_of_images_is_no_output_folder(
    visualize: Visualize, run: Path, images: list[Path], tmp_path: Path
) -> None:
    image = shutil.copy(images[0], tmp_path)
    for _ in range(2):  # its own drawings are no input
        result = visualize(tmp_path, "--overwrite", "--point=1,1")
        assert result.exit_code == 0, result.stderr
        assert "Visualized 1 of 1 images" in result.stderr
    assert is_output_folder(tmp_path / "out")
    inputs = [InputImage(Path(image), PurePath("a"))]
    with pytest.raises(ConfigError, match=r"which contains files and is not marked"):
        list(visualize_run.visualize_files(run, inputs, tmp_path, device="cpu"))
    assert not is_output_folder(tmp_path)


def save_network(path: Path, region_head: str, deform_layers: int = 1) -> Path:
    """Save a network that predicts jade everywhere, which is one region of the class 2."""
    torch.manual_seed(0)
    config = ModelConfig(
        encoder="resnet18",
        encoder_depth=3,
        architecture="plain",
        deform_layers=deform_layers,
        region_head=region_head,
    )
    network = build_segmenter(config, num_classes=SCENE_CLASSES.num_classes)
    bias = network._head_layers()[0].bias
    assert isinstance(bias, torch.Tensor)
    with torch.no_grad():
        bias[2] = 1000.0
    save_weights(
        path,
        network.state_dict(),
        model=config,
        class_map=SCENE_CLASSES,
        preprocessing=Preprocessing(),
        scores={},
    )
    return path


def draw_regions(
    invoke: Invoke, tmp_path: Path, image: Path, region_head: str, *options: str, layers: int = 1
) -> Result:
    weights = save_network(tmp_path / "head.safetensors", region_head, layers)
    out = tmp_path / "out"
    return invoke(
        *("visualize-offsets", weights, image, "--out", out, "--device=cpu", "--overwrite"),
        *options,
    )


@pytest.mark.parametrize("options", [(), ("--regions=jade",), ("--regions=coral, jade",)])
def test_regions_are_drawn(
    invoke: Invoke, images: list[Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    result = draw_regions(invoke, tmp_path, images[0], "deformable-rfcn", "--point=9,9", *options)
    assert result.exit_code == 0, result.stderr
    stem = tmp_path / "out" / images[0].stem
    assert str(stem / "regions.png") in result.stdout.splitlines()
    (region,) = json.loads((stem / "offsets.json").read_text())["regions"]
    assert region["class"] == "jade"
    assert region["box_xyxy"] == [0, 0, 96, 64]
    assert region["bins_xyxy"] == region["plain_bins_xyxy"]  # not trained


def test_a_class_without_regions_is_a_note(
    invoke: Invoke, images: list[Path], tmp_path: Path
) -> None:
    result = draw_regions(invoke, tmp_path, images[0], "deformable-rfcn", "--regions=amber,coral")
    assert result.exit_code == 0, result.stderr
    assert f"{images[0]}: no region of amber, coral is predicted." in result.stderr
    assert "regions.png" not in result.stdout


@pytest.mark.parametrize("options", [(), ("--regions=jade",)])
def test_a_head_without_offsets_has_no_bins_to_draw(
    invoke: Invoke, images: list[Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    result = draw_regions(invoke, tmp_path, images[0], "rfcn", *options)
    assert result.exit_code == 0, result.stderr
    assert ("(rfcn) has no offsets; no region is drawn" in result.stderr) == bool(options)
    assert "regions.png" not in result.stdout
    assert "regions" not in json.loads(
        (tmp_path / f"out/{images[0].stem}/offsets.json").read_text()
    )


def test_a_network_with_offsets_in_the_region_head_only(
    invoke: Invoke, images: list[Path], tmp_path: Path
) -> None:
    result = draw_regions(invoke, tmp_path, images[0], "deformable-fc", layers=0)
    assert result.exit_code == 0, result.stderr
    assert [Path(line).name for line in result.stdout.splitlines()] == [
        "regions.png",
        "offsets.json",
    ]
    result = draw_regions(invoke, tmp_path, images[0], "deformable-fc", "--point=1,1", layers=0)
    assert result.exit_code == 2
    assert "without deformable layers" in result.stderr


@pytest.mark.parametrize(
    ("region_head", "classes", "text"),
    [
        ("none", "jade", "--regions needs a network with a region head"),
        ("deformable-rfcn", "jade,ruby", "the class 'ruby'; expected one or several of coral"),
        ("deformable-rfcn", "background", "the class 'background'"),
        ("rfcn", "ruby", "the class 'ruby'"),
    ],
)
def test_wrong_regions_stop_before_any_image_is_drawn(
    invoke: Invoke, images: list[Path], tmp_path: Path, region_head: str, classes: str, text: str
) -> None:
    result = draw_regions(invoke, tmp_path, images[0], region_head, "--regions", classes)
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_html_pages_and_their_gallery(
    visualize: Visualize, images: list[Path], tmp_path: Path
) -> None:
    for name in ("a/one.jpg", "two.jpg"):
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images[0], tmp_path / "given" / name)
    (tmp_path / "given" / "broken.png").write_bytes(b"\x89PNG")
    result = visualize(tmp_path / "given", "--html", "--point=10,20")
    assert result.exit_code == 3
    assert "Visualized 2 of 3 images" in result.stderr
    written = [Path(line) for line in result.stdout.splitlines()]
    out = tmp_path / "out"
    assert written == [out / "a" / "one.html", out / "two.html", out / "index.html"]
    assert is_output_folder(out)
    assert '<a href="../index.html">' in written[0].read_text()
    assert '<a href="index.html">' in written[1].read_text()
    assert '"pins": [[10.0, 20.0]]' in written[1].read_text()
    assert '<a href="a/one.html">' in written[2].read_text()


def test_html_page_of_a_single_image(
    visualize: Visualize, images: list[Path], tmp_path: Path
) -> None:
    image = shutil.copy(images[0], tmp_path / "index.jpg")
    assert visualize(image, "--html").exit_code == 0
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["index.html"]
    result = visualize(image, images[0], "--html", "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert "gallery.html" in result.stdout


def test_html_pages_of_a_data_folder_have_the_ground_truth(
    visualize: Visualize, run: Path, scenes: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(scenes / "test", tmp_path / "data")
    first, second = sorted((data / "images").iterdir())
    Image.new("L", (96, 64), 77).save(data / "masks" / f"{second.stem}.png")
    result = visualize(data, "--html")
    assert result.exit_code == 0, result.stderr
    assert f"The page of {second} has no ground truth: {data}/masks/" in result.stderr
    pages = [tmp_path / "out" / "images" / f"{image.stem}.html" for image in (first, second)]
    assert ["Ground truth" in page.read_text() for page in pages] == [True, False]


def test_html_stops_before_any_page(
    invoke: Invoke, visualize: Visualize, run: Path, images: list[Path], tmp_path: Path
) -> None:
    for option in ("--regions=coral", "--animate", f"--compare={run}"):
        result = visualize(images[0], "--html", option)
        assert result.exit_code == 2
        assert "its pages show no regions, second network or animation" in result.stderr
    result = visualize(images[0], "--html", "--point=500,1")
    assert result.exit_code == 2
    assert "The point 500,1 is outside the image" in result.stderr
    model = {"encoder": "resnet18", "decoder_channels": 16, "deform_layers": 0}
    path = tmp_path / "plain.safetensors"
    weights = rewrite_weights(run, path, {"model": model}, without="conv_offset")
    result = invoke("visualize-offsets", weights, images[0], "--html", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "is a plain network without deformable layers" in result.stderr
    with pytest.raises(ConfigError, match=r"which contains files and is not marked"):
        list(explore_files(run, [], tmp_path, device="cpu"))
    assert not (tmp_path / "out").exists()
