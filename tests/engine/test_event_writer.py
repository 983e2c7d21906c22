from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dcnseg.engine import event_writer
from dcnseg.engine.event_writer import open_event_writer
from dcnseg.errors import ConfigError

RECORD = {"epoch": 2, "loss": 0.5, "class_iou": {"road": 0.25, "sky": None}, "note": "text"}


def test_without_a_folder_nothing_happens() -> None:
    with open_event_writer(None) as write:
        write(RECORD)


def test_numbers_reach_the_writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for the optional package, so that the test runs without it."""
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: Path) -> None:
            assert folder == tmp_path

        def __enter__(self) -> SummaryWriter:
            return self

        def __exit__(self, *_: Any) -> None:
            written.append(("closed", 0, 0))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(event_writer, "find_spec", lambda _: object())
    with open_event_writer(tmp_path) as write:
        write(RECORD)
    assert written == [
        ("epoch", 2, 2),
        ("loss", 0.5, 2),
        ("class_iou/road", 0.25, 2),
        ("closed", 0, 0),
    ]


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(event_writer, "find_spec", lambda _: None)
    with (
        pytest.raises(ConfigError, match=r"the package tensorboard: pip install tensorboard$"),
        open_event_writer(tmp_path),
    ):
        pass
