"""Wrong values in every place of a checkpoint and of a run's other files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcnseg.checkpoint import RESUME_STATE, load_resume_state
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import CLASSES, CONFIG, METRICS, create_run, is_run, read_run
from dcnseg.engine.saved_state import restore_state, save_state
from dcnseg.engine.state import TrainingState
from dcnseg.engine.training_data import FILES, check_files_are_unchanged, find_training_splits
from tests.conftest import small_config
from tests.engine.runs import take_step, tiny_state
from tests.garbage import JSON_GARBAGE, garbled, refusal

GARBAGE: tuple[Any, ...] = (
    *(None, -1, 10**30, 0.5, math.nan, "abc", [1], {"a": 1}, {1: 2}),
    *(torch.zeros(2, dtype=torch.int64), torch.tensor(0.5)),
)

PARTS = ("model", "average", "optimizer", "schedule", "scaler", "preprocessing", "so_far", "random")


@pytest.mark.parametrize(
    ("optimizer", "garbage"),
    [
        ("sgd", ("abc", {"a": 1})),
        pytest.param("sgd", GARBAGE, marks=pytest.mark.slow),
        pytest.param("adamw", GARBAGE, marks=pytest.mark.slow),
    ],
)
def test_wrong_values_are_refused_or_harmless(
    optimizer: str, garbage: tuple[Any, ...], tmp_path: Path
) -> None:
    path = tmp_path / RESUME_STATE
    save_state(path, tiny_state(optimizer))
    saved = load_resume_state(path)
    parts = ("optimizer",) if optimizer == "adamw" else PARTS
    num_refused, state = 0, tiny_state(optimizer)
    for where, wrong in garbled({part: saved[part] for part in parts}, garbage):
        if not where:
            continue
        message = try_to_restore(state, saved | wrong, path)
        if message:
            assert message.startswith(f"{path} does not fit the run's settings: "), where
            assert len(message.splitlines()) == 1
            num_refused += 1
        else:
            take_step(state)
            assert math.isfinite(state.schedule.get_last_lr()[0])
            state = tiny_state(optimizer)
    assert num_refused > 20
    assert not try_to_restore(tiny_state(optimizer), saved, path)


def try_to_restore(
    state: TrainingState, saved: Mapping[str, Any], path: Path = Path(RESUME_STATE)
) -> str:
    return refusal(lambda: restore_state(state, saved, path))


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Any]:
    """A state that was saved and loaded."""
    save_state(tmp_path / RESUME_STATE, tiny_state())
    return load_resume_state(tmp_path / RESUME_STATE)


@pytest.mark.parametrize("position", [-1, 625, 10**9])
def test_invalid_positions_of_numpys_generator_are_refused(
    position: int, saved: dict[str, Any]
) -> None:
    before: Any = np.random.get_state(legacy=True)
    name, keys, _, *rest = saved["random"]["numpy"]
    saved["random"]["numpy"] = (name, keys, position, *rest)
    assert f"'MT19937' at {position}; expected" in try_to_restore(tiny_state(), saved)
    after: Any = np.random.get_state(legacy=True)
    assert after[2] == before[2]


def test_a_missing_part_is_named(saved: dict[str, Any]) -> None:
    del saved["optimizer"]
    text = "x does not fit the run's settings: optimizer is missing"
    assert text in try_to_restore(tiny_state(), saved, Path("x"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_non_finite_values_are_refused(value: float, part: str, saved: dict[str, Any]) -> None:
    tensors = saved["model"] if part == "model" else saved["optimizer"]["state"][0]
    next(iter(tensors.values())).view(-1)[0] = value
    message = try_to_restore(tiny_state(), saved)
    assert re.search(rf"settings: its {part}: 1 of the \d values of ", message)


CLASS_MAP = ClassMap((ClassInfo(3, "road", (1, 2, 3)), ClassInfo(7, "tree", (4, 5, 6))))
Read = Callable[[Path], object]


@pytest.fixture(scope="module")
def written(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run that has just started."""
    run = tmp_path_factory.mktemp("written") / "run"
    config = small_config(scenes)
    create_run(run, config, {"lr": "default"}, CLASS_MAP, find_training_splits(config))
    (run / METRICS).write_text('{"epoch": 1, "loss": 0.5}\n{"epoch": 2, "loss": 0.25}\n')
    return run


def read_files(scenes: Path) -> Read:
    splits = find_training_splits(small_config(scenes))
    return lambda run: check_files_are_unchanged(run, splits)


@pytest.mark.parametrize("name", [CONFIG, CLASSES, FILES, METRICS])
def test_wrong_values_in_the_files_of_a_run_are_refused(
    name: str, written: Path, scenes: Path
) -> None:
    path = written / name
    before = path.read_bytes()
    reads: dict[str, Read] = {FILES: read_files(scenes), METRICS: read_metrics}
    read = reads.get(name, read_run)
    read(written)
    whole = (b"", b"null", b"[]", b"{}", b"[" * 10**5, b"1" * 5000, b'"\\ud800"', b"\xff")
    contents = [text + b"\n" for text in whole]
    first = before.partition(b"\n")[0] if name == METRICS else before
    for _, wrong in garbled(json.loads(first), JSON_GARBAGE):
        contents.append(json.dumps(wrong).encode() + b"\n")
    num_refused = 0
    try:
        for content in contents:
            path.write_bytes(content)
            is_run(written)
            message = refusal(lambda: read(written))
            if message:
                is_named = str(path) in message
                assert is_named or (name == FILES and "has changed" in message), content[:200]
                assert len(message) < 600
                num_refused += 1
    finally:
        path.write_bytes(before)
    assert num_refused > 40
