from __future__ import annotations

import shutil
from pathlib import Path

from tests.conftest import Invoke


def test_the_report_is_written_anew(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    result = invoke("report", copy)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{copy / 'report.html'}\n"
    for name in ("report.html", "results.png", "confusion_matrix.png", "labels.png"):
        assert (copy / name).is_file()
    result = invoke("report", copy, "--out", tmp_path / "other.html")
    assert result.stdout == f"{tmp_path / 'other.html'}\n"


def test_what_is_no_run_is_an_error(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("report", tmp_path)
    assert result.exit_code == 1
    assert "expected a run folder" in result.stderr
