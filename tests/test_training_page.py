"""The snippet of docs/training.md runs, and a resumed run continues with its augmentation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import read_run

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text()


def test_the_snippet(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(scenes, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(snippet, "training.md", "exec"), {"__name__": "mine"})
    run = tmp_path / "runs" / "augmented"
    assert [record["epoch"] for record in read_metrics(run)] == [1, 2]
    assert read_run(run).config.augment == "mine.augment"
