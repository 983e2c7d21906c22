"""The environment of a resumed run: restored threads and warnings about differences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dcnseg.checkpoint import RESUME_STATE, load_resume_state, save_resume_state
from dcnseg.engine import environment
from dcnseg.engine.environment import (
    ENVIRONMENT,
    THREADS,
    describe_environment,
    restore_environment,
)
from dcnseg.engine.training import resume
from dcnseg.errors import CheckpointError
from tests.engine.runs import CPU, Recorder


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, not set by the user, on four processors."""
    for name in environment._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_processors", lambda: 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def restore(saved: dict[str, Any]) -> tuple[int, list[str]]:
    """Return the number of threads in the context, and the warnings."""
    warnings: list[str] = []
    with restore_environment(saved, CPU, None, warnings.append):
        return torch.get_num_threads(), warnings


def saved_with(**changes: object) -> dict[str, Any]:
    return {ENVIRONMENT: describe_environment(CPU, None) | changes}


def test_an_unchanged_environment_gives_no_warning() -> None:
    assert describe_environment(CPU, None)["processor"]
    assert restore(saved_with()) == (2, [])
    assert restore({}) == (2, [])  # checkpoint of an early version


@pytest.mark.parametrize(
    ("saved", "variable", "expected", "text"),
    [
        (3, "", 3, "Using 3 threads as before, instead of this machine's default of 2. Set OMP"),
        (3, "2", 2, "The environment of the run has changed: threads 2 (before: 3). The result"),
        (5, "", 2, "The environment of the run has changed: threads 2 (before: 5)."),
    ],
    ids=["restored", "set by the user", "more than processors"],
)
def test_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, saved: int, variable: str, expected: int, text: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    threads, (warning,) = restore(saved_with(threads=saved))
    assert threads == expected
    assert warning.startswith(text)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", sorted({*describe_environment(CPU, None)} - {THREADS}))
def test_every_other_difference_is_named(name: str) -> None:
    _, (text,) = restore(saved_with(**{name: "other"}))
    assert f"{name} {describe_environment(CPU, None)[name]} (before: other)" in text


@pytest.mark.parametrize("damaged", [3, [], {}, {THREADS: "2"}, {THREADS: 10**30}, {1: 2}])
def test_a_damaged_description_is_an_error(damaged: object) -> None:
    with pytest.raises(CheckpointError, match="environment recorded in the checkpoint is damaged"):
        restore({ENVIRONMENT: damaged})


def test_a_resume_warns_and_saves_the_new_environment(run_copy: Path) -> None:
    saved = load_resume_state(run_copy / RESUME_STATE)
    assert saved[ENVIRONMENT]["torch"] == torch.__version__
    changed = saved[ENVIRONMENT] | {"torch": "1.0", THREADS: 1}
    save_resume_state(run_copy / RESUME_STATE, saved | {ENVIRONMENT: changed})
    resume(run_copy, epochs=3, listener=(listener := Recorder()))
    assert len(listener.warnings) == 2
    assert f"torch {torch.__version__} (before: 1.0)" in listener.warnings[1]
    after = load_resume_state(run_copy / RESUME_STATE)[ENVIRONMENT]
    assert after == describe_environment(CPU, None) | {THREADS: 1}
