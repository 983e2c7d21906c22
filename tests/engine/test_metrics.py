from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dcnseg.checkpoint import RESUME_STATE, load_resume_state
from dcnseg.engine.metrics import read_metrics, restore_metrics
from dcnseg.engine.run_folder import METRICS
from dcnseg.errors import CheckpointError


@pytest.mark.parametrize(
    "line", ["{}", "null", "[]", '{"epoch": "1"}', '{"epoch": 0}', "{", '{"epoch": 1, "a": NaN}']
)
def test_a_damaged_line_is_named_and_an_incomplete_one_ignored(tmp_path: Path, line: str) -> None:
    (tmp_path / METRICS).write_text(f'{{"epoch": 1}}\n{line}\n{{"epoch": 3}}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged: line 2"):
        read_metrics(tmp_path)
    (tmp_path / METRICS).write_text('{"epoch": 1}\n{"epo')
    assert read_metrics(tmp_path) == [{"epoch": 1}]


@pytest.mark.parametrize("damage", ["deleted", "cut", "first line gone", "nonsense", "intact"])
def test_damaged_metrics_are_restored(run: Path, tmp_path: Path, damage: str) -> None:
    whole = (run / METRICS).read_text()
    first, second = whole.splitlines(keepends=True)
    left = {"cut": first + second[:9], "first line gone": second, "nonsense": "{}\n["}
    if damage != "deleted":
        (tmp_path / METRICS).write_text(left.get(damage, whole))
    saved = load_resume_state(run / RESUME_STATE)["metrics"]
    warnings: list[str] = []
    assert restore_metrics(tmp_path, 2, saved, warnings.append) == whole
    assert not warnings
    assert (tmp_path / METRICS).read_text() == whole


@pytest.mark.parametrize("saved", [3, b"", ["line"], "\udcff\n"])
def test_a_damaged_copy_in_the_checkpoint_is_an_error(tmp_path: Path, saved: Any) -> None:
    with pytest.raises(CheckpointError, match=r"last\.ckpt: its copy of metrics\.jsonl is damaged"):
        restore_metrics(tmp_path, 2, saved, print)
