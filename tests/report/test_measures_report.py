from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dcnseg.data.image_io import read_image
from dcnseg.report.measures_report import COLUMNS, summarize_layers, write_measures
from dcnseg.visualize.measures.measuring import OffsetSums
from dcnseg.visualize.measures.results import FieldRadius, OffsetMeasures
from tests.layer_offsets import CLASSES, make_labels, make_layer, make_radial_offset


def make_measures(scale: float, *, names: str = "ab", is_modulated: bool = False) -> OffsetMeasures:
    """Measures of layers whose grids are stretched."""
    sums = OffsetSums(CLASSES)
    offset = make_radial_offset(torch.full((16, 20), scale))
    mask = torch.full((1, 9, 16, 20), 1.5) if is_modulated else None
    sums.add([make_layer(offset, mask, name=name) for name in names], make_labels()[0])
    return sums.result(fields={"disc": FieldRadius(3, 1.5, 4.0, 2.5, np.nan)})


def test_json_and_csv_agree(tmp_path: Path) -> None:
    measures = make_measures(2, is_modulated=True)
    paths = write_measures(tmp_path, measures)
    assert [path.name for path in paths] == ["measures.json", "measures.csv", "offset_measures.png"]
    assert read_image(paths[2]).shape[1] > 1000
    content = json.loads(paths[0].read_text())
    with paths[1].open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    by_key = {(row["layer"], row["by"], row["group"]): row for row in rows}
    assert len(by_key) == len(rows) == 3 * (2 + 4 + 3 + 6) + 1
    for layer in content["layers"]:
        for by, groups in layer["groups"].items():
            for name, group in groups.items():
                row = by_key[layer["name"], by, name]
                assert int(row["locations"]) == group["locations"]
                for column, value in (
                    ("dilation_px", group["dilation"]["px"]),
                    ("relative_dilation", group["dilation"]["relative"]),
                    ("on_object", group["on_object"]["own"]),
                    ("shuffled_on_object", group["on_object"]["shuffled"]),
                    ("modulated_on_object", group["on_object"]["modulated"]),
                ):
                    assert float(row[column] or "nan") == pytest.approx(
                        np.nan if value is None else value, abs=1e-4, nan_ok=True
                    )
    whole = by_key["a", "all", "all"]
    assert float(whole["plain_dilation_px"]) == 4
    assert float(whole["mean_modulation"]) == 1.5
    assert float(whole["constant_share"]) == 1
    assert whole["content_share"] == ""  # a single image
    assert by_key["cascade", "all", "objects"]["dilation_px"] == ""
    assert float(by_key["cascade", "all", "all"]["outside_share"]) > 0
    field = by_key["network", "class", "disc"]
    assert (field["radius_90_px"], field["zeroed_radius_90_px"]) == ("4", "")
    assert content["fields"]["disc"]["zeroed_most_px"] is None
    assert content["layers"][0]["modulation"]["tap_means"] == [[1.5] * 9]


def test_rows_are_averaged_over_runs() -> None:
    first, second = make_measures(2), make_measures(3)
    layer, _, cascade = summarize_layers([first, second])
    assert (layer["layer"], cascade["layer"]) == ("a", "cascade")
    assert layer["plain, px"] == 4
    assert layer["small"] == pytest.approx(10)
    assert np.isnan(layer["large"])
    own = [m.layers[0].groups["all"]["objects"].on_object.own for m in (first, second)]
    assert layer["on object"] == pytest.approx(np.mean(own))
    assert np.isnan(cascade["small"])
    assert cascade["outside"] > layer["outside"]
    single = replace(make_measures(2, names="a"), layers=first.layers[:1])
    assert [row["layer"] for row in summarize_layers([first, single])] == ["a"]
