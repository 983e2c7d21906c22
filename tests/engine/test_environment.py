"""Whether a resumed run computes as before, and what is said if not."""

from __future__ import annotations

import shutil
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
    computes_as_before,
    describe_environment,
    processor_name,
)
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.training import resume
from dcnseg.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads of four processors, none of which the user has set."""
    for name in environment._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_processors", lambda: 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def enter(saved: dict[str, Any]) -> tuple[int, list[str]]:
    """The number of threads within, and the warnings."""
    warnings: list[str] = []
    with computes_as_before(saved, CPU, None, warnings.append):
        return torch.get_num_threads(), warnings


def saved_with(**changes: object) -> dict[str, Any]:
    return {ENVIRONMENT: describe_environment(CPU, None) | changes}


def test_nothing_is_said_where_nothing_has_changed() -> None:
    assert enter(saved_with()) == (2, [])
    assert enter({}) == (2, [])  # a state of an earlier version


def test_the_number_of_threads_is_restored_within() -> None:
    threads, (text,) = enter(saved_with(threads=3))
    assert threads == 3
    assert text.startswith("Computing with 3 threads, as the run did before, although 2 would")
    assert torch.get_num_threads() == 2


def test_what_the_user_has_set_is_kept_and_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads, (text,) = enter(saved_with(threads=3))
    assert threads == 2
    assert text.startswith("What the run computes with has changed: threads 2 (before: 3). So its")


def test_more_threads_than_processors_are_not_taken() -> None:
    threads, (text,) = enter(saved_with(threads=5))
    assert threads == 2
    assert "threads 2 (before: 5)" in text


@pytest.mark.parametrize("name", sorted({*describe_environment(CPU, None)} - {THREADS}))
def test_every_other_difference_is_named(name: str) -> None:
    _, (text,) = enter(saved_with(**{name: "other"}))
    assert f"{name} {describe_environment(CPU, None)[name]} (before: other)" in text


@pytest.mark.parametrize("damaged", [3, [], {}, {THREADS: "2"}, {THREADS: 10**30}, {1: 2}])
def test_a_damaged_description_is_an_error(damaged: object) -> None:
    with pytest.raises(CheckpointError, match="description of its environment is damaged"):
        enter({ENVIRONMENT: damaged})


def test_the_processor_has_a_name() -> None:
    assert processor_name()


class Warned(TrainingListener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warned(self, text: str) -> None:
        self.texts.append(text)


def test_a_resumed_run_is_warned_and_notes_the_new_environment(run: Path, tmp_path: Path) -> None:
    copy, listener = tmp_path / "run", Warned()
    shutil.copytree(run, copy)
    saved = load_resume_state(copy / RESUME_STATE)
    assert saved[ENVIRONMENT]["torch"] == torch.__version__
    changed = saved[ENVIRONMENT] | {"torch": "1.0", THREADS: 1}
    save_resume_state(copy / RESUME_STATE, saved | {ENVIRONMENT: changed})
    resume(copy, epochs=3, listener=listener)
    assert len(listener.texts) == 2
    assert f"torch {torch.__version__} (before: 1.0)" in listener.texts[1]
    after = load_resume_state(copy / RESUME_STATE)[ENVIRONMENT]
    assert after == describe_environment(CPU, None) | {THREADS: 1}
