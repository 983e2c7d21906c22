from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dcnseg.files import is_output_folder
from dcnseg.visualize.measures.measuring import OffsetSums
from dcnseg.visualize.measures.results import PREDICTIONS, FieldRadius
from dcnseg_cli.measures_table import describe_problems, measures_tables
from tests.conftest import Invoke, rewrite_weights
from tests.layer_offsets import CLASSES, make_labels, make_layer, make_radial_offset


def test_tables_and_problems() -> None:
    sums = OffsetSums(CLASSES)
    offset = make_radial_offset(torch.full((16, 20), 2.0))
    broken = offset.clone()
    broken[..., 0, 0] = torch.nan
    mask = torch.full((1, 9, 16, 20), 0.05)
    layers = [
        make_layer(0 * offset, name="dead"),
        make_layer(99 + offset, mask, name="runaway"),
        make_layer(broken, name="broken"),
        make_layer(offset, name="[red]last"),
    ]
    sums.add(layers, make_labels()[0])
    measures = sums.result(
        labels=PREDICTIONS, fields={"disc": FieldRadius(3, 1.5, 4.0, 2.5, float("nan"))}
    )
    assert list(describe_problems(measures)) == [
        "dead is dead: its offsets never moved (root mean square 0.000, below 0.05 px of its map).",
        "runaway runs away: 100% of its samples are outside the image (7% of the plain grid).",
        "broken has offsets that are not finite at 0.3% of its locations, which are left out.",
    ]
    console = Console(width=160, record=True)
    for table in measures_tables(measures):
        console.print(table)
    text = console.export_text()
    assert "1 images, predicted objects" in text
    assert "[red]last" in text
    assert "<b>ring</b>" in text
    assert "8.0 ± 0.0" in text
    assert "own, weighted by modulation" in text
    assert "last 3 in cascade" in text
    assert "100.0%" in text  # of the modulation below 0.1
    (row,) = (line for line in text.splitlines() if "disc" in line and "1.5" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        *("disc", "3", "1.5", "4.0", "2.5", "-"),
    ]


def test_a_data_folder_is_measured(invoke: Invoke, run: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(
        *("visualize-offsets", run, scenes, "--table", "--split=test", "--out", out),
        *("--device=cpu", "--gradient-pixels=1"),
    )
    assert result.exit_code == 0, result.stderr
    assert "Effective dilation in px, 2 images, objects of the masks" in result.stdout
    assert "layer4.1.conv2" in result.stdout
    content = json.loads((out / "measures.json").read_text())
    assert (content["images"], content["labels"]) == (2, "masks")
    assert len(content["layers"]) == 3
    assert "background" in content["fields"]
    with (out / "measures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(row["layer"] == "network" for row in rows) == len(content["fields"])
    assert is_output_folder(out)
    assert str(out / "measures.csv") in result.stderr


def test_images_without_masks_use_the_prediction(
    invoke: Invoke, run: Path, images: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(images[0].parent, folder)
    arguments = ("--table", "--device=cpu", "--gradient-pixels=0", "--out", tmp_path / "out")
    result = invoke("visualize-offsets", run, folder, *arguments)
    assert result.exit_code == 0, result.stderr
    assert f"{folder} has no masks: the predicted label maps" in result.stderr
    assert "3 images, predicted objects" in result.stdout
    content = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert (content["labels"], content["fields"]) == ("predictions", {})


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("{run} {scenes} --point=1,1", 2, "it draws nothing; remove --point, --regions, --compare"),
        ("{run} {scenes} --animate", 2, "it draws nothing"),
        ("{run} {scenes} {scenes}", 2, "pass one data folder"),
        ("{run} {tmp}/none", 3, "none: does not exist."),
        ("{run} {tmp}", 3, "has no images"),
        ("{run} {scenes} --split=dev", 2, "--split is 'dev'"),
        ("{plain} {scenes}", 2, "no deformable layer"),
    ],
)
def test_errors(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path, arguments: str, code: int, text: str
) -> None:
    plain = tmp_path / "plain.safetensors"
    model = {"encoder": "resnet18", "decoder_channels": 16, "deform_layers": 0}
    rewrite_weights(run, plain, {"model": model}, without="conv_offset")
    paths = {"run": run, "scenes": scenes, "tmp": tmp_path, "plain": plain}
    given = arguments.format(**paths).split()
    result = invoke("visualize-offsets", *given, "--table", "--out", tmp_path / "out")
    assert result.exit_code == code
    assert text in result.stderr
    assert not (tmp_path / "out").exists()


def test_some_missing_masks_are_an_error(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(scenes, tmp_path / "copy")
    next((copy / "val" / "masks").iterdir()).unlink()
    result = invoke("visualize-offsets", run, copy, "--table", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "1 of 13 images have no mask" in result.stderr
