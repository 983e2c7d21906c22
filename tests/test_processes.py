from __future__ import annotations

import os

import pytest

from dcnseg.errors import ConfigError
from dcnseg.processes import Process, this_process

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def set_all(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert this_process() == Process()
    set_all(monkeypatch, WORLD_SIZE="4")  # as some schedulers do
    assert this_process() == Process()
    assert this_process().is_main


def test_variables_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, **TORCHRUN, LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    set_all(monkeypatch, TORCHELASTIC_RESTART_COUNT="5", TORCHELASTIC_RUN_ID="job")
    process = this_process()
    assert process == Process(3, 4, 1, 2, restarts=5, job="job")
    assert not process.is_main
    assert process.describe().startswith(f"rank 3, process {os.getpid()} on ")


def test_a_job_without_an_id_is_identified_by_its_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TORCHELASTIC_RUN_ID="none")
    assert this_process().job.endswith(f":{os.getppid()}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected an integer"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 4, but MASTER_PORT is not set. Start several"),
        ({"RANK": "4"}, "WORLD_SIZE is 4, but RANK is 4"),
    ],
)
def test_wrong_variables(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    set_all(monkeypatch, **(TORCHRUN | changes))
    with pytest.raises(ConfigError, match=message):
        this_process()
