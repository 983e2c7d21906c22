from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dcnseg.data.image_io import read_image
from dcnseg.engine.compared_runs import (
    Comparison,
    Difference,
    OffsetEvidence,
    RunResult,
    TrainedRun,
    VariantResult,
)
from dcnseg.report.comparison_report import COLUMNS, summarize_variant, write_comparison
from dcnseg.scoring.bootstrap import Interval
from dcnseg.scoring.objects import ObjectScore
from dcnseg.scoring.scores import ImageScores, Scores
from dcnseg.visualize.measures.measuring import OffsetSums
from dcnseg.visualize.measures.results import OffsetMeasures
from dcnseg_cli.comparison_table import comparison_table
from tests.conftest import small_config
from tests.layer_offsets import CLASSES, make_labels, make_layer, make_radial_offset


def make_run(correct: int, offsets: OffsetEvidence | None = None) -> RunResult:
    counts = np.array([[correct, 100, 100], [correct, 100, 100]])
    image = ImageScores("a", counts, counts, (ObjectScore(1, 50, correct / 100),))
    confusion = np.array([[correct, 100 - correct], [100 - correct, correct]])
    scores = Scores(confusion, ("background", "<b>object</b>"), (image,))
    run = TrainedRun("a", Path("runs/a"), 1)
    return RunResult(run, 0.5, scores, 1234, 90.0, offsets)


def make_measures(scale: float) -> OffsetMeasures:
    """The grids of two layers are stretched by `scale`; the second does not sample the image."""
    sums = OffsetSums(CLASSES)
    far = make_layer(torch.full((1, 9, 2, 16, 20), 99.0), name="b")
    scales = torch.full((16, 20), scale)
    sums.add([make_layer(make_radial_offset(scales), name="layer"), far], make_labels()[0])
    measures = sums.result()
    layer, other = measures.layers
    layers = replace(layer, rank_correlation=-0.125), replace(other, rank_correlation=0.0625)
    return replace(measures, layers=layers)


@pytest.fixture
def comparison() -> Comparison:
    replaced = {"zeroed": 0.25, "shuffled": 0.5}
    runs = [
        make_run(correct, OffsetEvidence(replaced, make_measures(scale)))
        for correct, scale in ((80, 2.0), (82, 3.0))
    ]
    variants = (
        VariantResult("plain", (make_run(60), make_run(64)), 12.34),
        VariantResult("deformable", tuple(runs), 15.0),
    )
    difference = Difference("deformable", "plain", Interval(0.2, 0.1, 0.3), False, 2, 20)
    config = small_config(Path("data"))
    failed = {"plain-seed3": "it diverged"}
    command = "dcnseg compare data --out <here>"
    return Comparison(config, command, "test", 1, variants, "plain", (difference,), failed)


def test_all_files_agree(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(comparison, tmp_path)
    with (tmp_path / "comparison.csv").open() as file:
        plain, deformable = csv.DictReader(file)
    assert list(plain) == list(COLUMNS)
    assert plain["mIoU, offsets zeroed"] == ""
    assert plain["large"] == ""  # no such object
    assert (deformable["mIoU, offsets zeroed"], deformable["mIoU, offsets shuffled"]) == (
        *("0.25", "0.5"),
    )
    assert deformable["dilation and object size"] == "-0.125"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sentences"] == comparison.sentences()
    assert results["differences"][0]["low"] == 0.1
    assert [entry["variant"] for entry in results["variants"]] == ["plain", "deformable"]
    assert results["variants"][0]["large"] is None
    entries = results["variants"][1]["run_results"]
    assert [entry["dilation_rank_correlation"]["b"] for entry in entries] == [0.0625] * 2
    dilations = [
        entry["offset_measures"]["layers"][0]["groups"]["size"]["small"]["dilation"]["px"]
        for entry in entries
    ]
    assert dilations == [8, 12]
    assert read_image(tmp_path / "comparison.png").shape[1] > 1000
    page = (tmp_path / "report.html").read_text()
    assert "deformable is better than plain by 0.200 mIoU" in page
    assert "--out &lt;here&gt;" in page
    assert "<b>object" not in page
    assert "plain-seed3 failed and is not compared: it diverged" in page


def test_the_page_shows_what_the_offsets_do(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(comparison, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>What the offsets do</h2>" in page
    row = page[page.index("<td>deformable</td><td>layer</td>") :].split("</tr>")[0]
    # Plain, small, medium and background, averaged over the runs; there are no large objects.
    assert "<td>4.0</td><td>10.0</td><td>10.0</td><td>10.0</td>" in row
    assert "<th>medium</th><th>background</th>" in page
    assert "<td>cascade</td>" in page
    assert page.count("runs/a: b samples mostly outside the image.") == 2
    assert "is dead" not in page
    fixed = replace(comparison, variants=comparison.variants[:1], differences=())
    write_comparison(fixed, tmp_path)
    assert "What the offsets do" not in (tmp_path / "report.html").read_text()


def test_scores_are_averaged_over_runs(comparison: Comparison) -> None:
    row = summarize_variant(comparison.variants[0])
    iou = [60 / 140, 64 / 136]
    assert row["mIoU"] == pytest.approx(np.mean(iou))
    assert (row["lowest"], row["highest"]) == pytest.approx(tuple(iou))
    assert row["small"] == pytest.approx(0.62)
    assert row["minutes of training"] == 1.5
    assert row["ms per image"] == 12.3


def test_table_has_a_row_per_variant(comparison: Comparison) -> None:
    table = comparison_table(comparison)
    assert table.row_count == 2
    assert list(table.columns[1].cells) == ["0.450", "0.681"]
