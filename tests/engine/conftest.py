from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run_copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that tests may change."""
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def data_copy(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes that tests may change."""
    return shutil.copytree(scenes, tmp_path / "data")
