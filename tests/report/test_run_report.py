from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from dcnseg.checkpoint import BEST_WEIGHTS
from dcnseg.engine.listener import RunSummary, TrainingListener
from dcnseg.engine.run_folder import (
    CLASSES,
    CONFIG,
    CONFUSION_CHART,
    CURVES_CHART,
    LABELS_CHART,
    METRICS,
    REPORT,
    SCORES,
)
from dcnseg.report import run_charts
from dcnseg.report.run_charts import keep_report
from dcnseg.report.run_report import write_run_report
from tests.engine.runs import Recorder

CHARTS = (CURVES_CHART, CONFUSION_CHART, LABELS_CHART)


@pytest.fixture(scope="module")
def report(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_report(run, tmp_path_factory.mktemp("report") / "report.html")


def test_report_is_one_small_file_without_references(report: Path, run: Path) -> None:
    text = report.read_text()
    assert len(text) < 10e6
    urls = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert urls
    assert all(url.startswith(("#", "data:image/")) for url in urls)
    assert "url(" not in text.replace("url(#", "")
    assert text.count("<svg") == 3
    assert text.count("<img") == 4  # preview, batch, two of the offsets
    scores = json.loads((run / SCORES).read_text())
    for value in (scores["mean_iou"], *scores["class_recall"].values()):
        assert value is None or f"{value:.3f}" in text
    assert f"dcnseg predict {run} IMAGES --out predictions" in text
    ids = re.findall(r'id="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_names_are_escaped_and_missing_files_are_left_out(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    for name in (BEST_WEIGHTS, "preview.jpg", "train_batch.jpg", SCORES, METRICS):
        (copy / name).unlink()
    for name in (CONFIG, CLASSES):
        text = (copy / name).read_text().replace("star", "<script>alert(1)</script>")
        (copy / name).write_text(text)
    config = json.loads((copy / CONFIG).read_text())
    config["command"] = ["/bin/dcnseg", "train", "a b", "<img src=x>"]
    assert write_run_report(copy).is_file()  # a run of an early version
    config["sources"] = {"epochs": "<b>"}
    (copy / CONFIG).write_text(json.dumps(config))
    text = write_run_report(copy).read_text()
    assert "<script" not in text
    assert "<b>" not in text.replace("<b>0 min 0 s</b>", "")
    assert "dcnseg train &#39;a b&#39; &#39;&lt;img src=x&gt;&#39;" in text
    assert "<img" not in text
    assert "No figures: " in text


@pytest.mark.parametrize(
    ("width", "scheme", "background"),
    [(1200, "light", 251), (1200, "dark", 21), (390, "light", 251)],
)
def test_report_opens_in_a_browser(
    browser: Any, report: Path, width: int, scheme: str, background: int
) -> None:
    size = {"width": width, "height": 900}
    context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda entry: problems.append(entry.text))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert int(re.findall(r"\d+", color)[0]) == background
    assert page.locator("h2").all_inner_texts() == [
        *("Curves", "Classes", "Confusion matrix", "Best, median and worst images"),
        *("Offsets", "Data", "How to repeat", "Settings"),
    ]
    assert problems == []
    context.close()


def test_charts_are_kept_up_to_date(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    summary = RunSummary(copy, {}, 5, 1, (), "cpu", "float32", 1, 2, 1)
    with keep_report(copy, TrainingListener()) as listener:
        listener.started(summary)
        listener.epoch_done({"epoch": 1}, is_best=False)
        assert not any((copy / name).exists() for name in CHARTS)  # not more often than this
        monkeypatch.setattr(run_charts, "INTERVAL_SECONDS", 0.0)
        listener.epoch_done({"epoch": 2}, is_best=False)
        assert all((copy / name).exists() for name in CHARTS)
        (copy / CURVES_CHART).unlink()
    assert (copy / CURVES_CHART).exists()
    assert (copy / REPORT).exists()


def test_an_interrupted_run_has_charts_but_no_report(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    summary = RunSummary(copy, {}, 5, 1, (), "cpu", "float32", 1, 2, 1)
    context = keep_report(copy, TrainingListener())
    context.__enter__().started(summary)
    assert not context.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (copy / CURVES_CHART).exists()
    assert not (copy / REPORT).exists()


def test_a_chart_that_cannot_be_drawn_is_a_warning(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / METRICS).write_text("{}\n")
    summary = RunSummary(copy, {}, 5, 1, (), "cpu", "float32", 1, 2, 1)
    recorder = Recorder()
    with keep_report(copy, recorder) as listener:
        listener.started(summary)
    charts, report = recorder.warnings
    assert charts.startswith(f"A chart of {copy} could not be written: ")
    assert report.startswith(f"The report of {copy} could not be written: ")
