from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcnseg.data.image_io import read_image
from dcnseg.data.synthetic import SCENE_CLASSES
from dcnseg.errors import ConfigError
from dcnseg.inference.regions import Region
from dcnseg.ops.deform_conv.module import DeformConv2d
from dcnseg.visualize.figures.summary import NetworkView
from dcnseg.visualize.offsets import capture_offsets
from dcnseg.visualize.points import NamedPoint
from dcnseg.visualize.region_bins import RegionBins
from dcnseg.visualize.report import to_json, visualize_image


class Network(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=8, padding=1)
        layers = [DeformConv2d(4, 4, 3, padding=1) for _ in range(num_layers)]
        for layer in layers:
            layer.backend = "reference"
            nn.init.constant_(layer.conv_offset.bias, 0.25)
        self.layers = nn.Sequential(*layers)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x))  # type: ignore[no-any-return]


def make_view(num_layers: int) -> NetworkView:
    torch.manual_seed(0)
    layers = []
    if num_layers:
        layers = capture_offsets(Network(num_layers), torch.rand(1, 3, 48, 64), (48, 64))
    return NetworkView("run", layers, np.zeros((48, 64), np.uint8), SCENE_CLASSES)


def visualize(tmp_path: Path, num_layers: int = 4, **options: Any) -> list[Path]:
    image = np.full((48, 64, 3), 80, np.uint8)
    settings: dict[str, Any] = {
        "image": image,
        "views": [make_view(num_layers)],
        "points": [NamedPoint((32.0, 24.0)), NamedPoint((0.0, 47.0))],
        "out_dir": tmp_path / "out",
        "stem": "street/a.b",
    }
    return visualize_image(**(settings | options))


def test_a_summary_and_a_folder_of_figures(tmp_path: Path) -> None:
    paths = visualize(tmp_path, num_layers=2, frames=2)
    assert [str(path.relative_to(tmp_path / "out")) for path in paths] == [
        "street/a.b.png",
        "street/a.b/dilation.png",
        "street/a.b/flow.png",
        "street/a.b/points.png",
        "street/a.b/point_32_24.png",
        "street/a.b/point_0_47.png",
        "street/a.b/animation.webp",
        "street/a.b/offsets.json",
    ]
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(written) == sorted(paths)
    for path in paths[:-1]:
        assert read_image(path).shape[1] >= 640


def test_formats(tmp_path: Path) -> None:
    paths = visualize(tmp_path, 1, points=[], suffixes=(".png", ".svg"))
    assert [path.name for path in paths] == [
        *("a.b.png", "a.b.svg", "dilation.png", "dilation.svg", "flow.png", "flow.svg"),
        "offsets.json",
    ]
    assert ">a.b: what run sees</text>" in paths[1].read_text()


def test_json_has_the_numbers_of_the_figures(tmp_path: Path) -> None:
    numbers = json.loads(visualize(tmp_path)[-1].read_text())
    assert numbers["image"] == {"height": 48, "width": 64}
    assert [layer["name"] for layer in numbers["layers"]] == [f"layers.{i}" for i in range(4)]
    layer = numbers["layers"][0]
    assert layer["input_stride_px_yx"] == [8, 8]
    assert layer["input_hw"] == [6, 8]
    assert layer["offset_length_map_px"]["mean"] == pytest.approx(0.25 * 2**0.5, abs=1e-4)
    dilation = layer["effective_dilation_px"]
    assert {dilation[key] for key in ("mean", "min", "max", "plain")} == {8}
    assert dilation["map"] == [[8] * 8] * 6

    point = numbers["points"][0]
    assert point["point_xy"] == [32, 24]
    assert point["location_xy"] == [32, 24]
    assert point["last_layer"]["layer"] == "layers.3"
    plain = [[32 + x, 24 + y] for y in (-8, 0, 8) for x in (-8, 0, 8)]
    assert point["last_layer"]["plain_positions_xy"] == plain
    assert point["last_layer"]["positions_xy"] == [[x + 2, y + 2] for x, y in plain]
    assert point["cascade"]["layers"] == ["layers.1", "layers.2", "layers.3"]
    cascade = np.array(point["cascade"]["positions_xy"])
    assert cascade.shape == (729, 2)
    assert cascade.mean(0) == pytest.approx([32 + 6, 24 + 6])
    assert np.array(point["cascade"]["plain_positions_xy"]).mean(0) == pytest.approx([32, 24])
    # A point at the lower edge uses the nearest location, whose samples may be outside.
    assert numbers["points"][1]["location_xy"] == [0, 40]
    assert max(y for _, y in numbers["points"][1]["last_layer"]["positions_xy"]) == 50


def test_invalid_settings_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"64,10 .* 64x48 .* 0\.\.63 and y in 0\.\.47"):
        visualize(tmp_path, points=[NamedPoint((5.0, 5.0)), NamedPoint((64.0, 10.0))])
    with pytest.raises(ConfigError, match="run has no deformable layer"):
        visualize(tmp_path, num_layers=0)
    assert not (tmp_path / "out").exists()


def test_json_is_strict_and_compact() -> None:
    content = {"b": [[1, 2], [3, 4]], "d": "[ x"}
    text = to_json({"a": [1.00001, math.nan, -math.inf], "c": (), **content})
    assert json.loads(text) == {"a": [1.0, None, None], "c": [], **content}
    assert '"a": [1.0, null, null]' in text
    assert "[3, 4]" in text


def make_region_bins() -> RegionBins:
    region = Region(2, 900, (16, 8, 56, 40), (16.0, 8.0, 56.0, 40.0), 0.8, 0.96, 2, 0.96)
    edges = np.array([[x, y, x + 20, y + 16] for y in (8.0, 24.0) for x in (16.0, 36.0)])
    plain = edges.reshape(2, 2, 4)
    return RegionBins(region, plain, plain + np.array([3.0, 4.0, 3.0, 4.0]))


def test_regions_are_in_a_figure_and_in_the_json(tmp_path: Path) -> None:
    paths = visualize(tmp_path, regions=[make_region_bins()])
    assert paths[-2].name == "regions.png"
    assert read_image(paths[-2]).shape[1] >= 640
    numbers = json.loads(paths[-1].read_text())
    assert numbers["regions"] == [
        {
            "class": "jade",
            "class_id": 2,
            "score": 0.96,
            "area_px": 900,
            "box_xyxy": [16, 8, 56, 40],
            "mean_offset_px": 5,
            "bins_xyxy": [
                [[19, 12, 39, 28], [39, 12, 59, 28]],
                [[19, 28, 39, 44], [39, 28, 59, 44]],
            ],
            "plain_bins_xyxy": [
                [[16, 8, 36, 24], [36, 8, 56, 24]],
                [[16, 24, 36, 40], [36, 24, 56, 40]],
            ],
        }
    ]


def test_without_regions_there_is_no_figure_of_them(tmp_path: Path) -> None:
    assert "regions" not in json.loads(visualize(tmp_path)[-1].read_text())
    paths = visualize(tmp_path, regions=[])
    assert not [path for path in paths if "regions" in path.name]
    assert json.loads(paths[-1].read_text())["regions"] == []


def test_a_network_may_have_only_offsets_of_regions(tmp_path: Path) -> None:
    regions = [make_region_bins()]
    paths = visualize(tmp_path, num_layers=0, points=[], regions=regions)
    assert [path.name for path in paths] == ["regions.png", "offsets.json"]
    numbers = json.loads(paths[-1].read_text())
    assert numbers["layers"] == numbers["points"] == []
    with pytest.raises(ConfigError, match="no deformable layer"):
        visualize(tmp_path, num_layers=0, regions=regions)
