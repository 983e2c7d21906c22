from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import SMALL_TRAINING, Invoke


def test_trained_runs_are_compared_and_reported(
    invoke: Invoke, run: Path, scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "comparison"
    copy = shutil.copytree(run, tmp_path / "copy")
    runs = (f"--run=deformable={run}", f"--run=deformable-v2={copy}")
    result = invoke("compare", scenes, "--out", out, *runs, *SMALL_TRAINING)
    assert result.exit_code == 0, result.stderr
    (sentence,) = json.loads((out / "results.json").read_text())["sentences"]
    assert "One run does not show a difference" in sentence
    assert sentence in result.stdout
    assert "test: 2 images" in result.stdout
    assert f"Report: {out / 'report.html'}" in result.stderr
    assert (out / "report.html").is_file()
    result = invoke("compare", scenes, "--out", out, *runs, *SMALL_TRAINING)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "pass DATA and --out DIR, or --resume DIR"),
        ("{scenes}", "pass DATA and --out DIR, or --resume DIR"),
        ("{scenes} --out {tmp}/a --run plain", "'plain' is not VARIANT=RUN"),
        ("{scenes} --out {tmp}/a --variants plain", "expected at least two"),
        ("{scenes} --out {tmp}/a --variants plain,fast", "--variants has 'fast'; expected plain"),
        ("{scenes} --out {tmp}/a --modulated", "No such option: --modulated"),
        ("{scenes} --out {tmp}/a --batch-size auto", "all runs need the same"),
        ("{scenes} --out {tmp}/a --epochz 3", "--epochz"),
        ("{scenes} --resume {tmp}", "no other option can be given"),
    ],
)
def test_errors(invoke: Invoke, scenes: Path, tmp_path: Path, arguments: str, text: str) -> None:
    result = invoke("compare", *arguments.format(scenes=scenes, tmp=tmp_path).split())
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "a").exists()
