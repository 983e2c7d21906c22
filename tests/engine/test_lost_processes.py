from __future__ import annotations

import pytest
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import Store

from dcnseg.engine import lost_processes
from dcnseg.engine.lost_processes import watch_processes
from dcnseg.errors import DataError, OtherProcessError, TrainingError
from dcnseg.processes import Process

CLOSED = "[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:5\nmore"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_processes, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(lost_processes, "SILENCE_SECONDS", 0.2)


def make_store() -> Store:
    """A store in which three processes have registered, and none beats."""
    store = HashStore()
    for rank in range(3):
        store.set(f"name/{rank}", f"rank {rank}, process {100 + rank} on host")
    return store


@pytest.mark.parametrize(
    ("rank", "kind", "names"),
    [
        (0, TrainingError, "Lost rank 1, process 101 on host; rank 2, process 102 on host: it"),
        (2, TrainingError, "Lost rank 0, process 100 on host; rank 1, process 101 on host: it"),
    ],
)
def test_silent_processes_are_named(rank: int, kind: type[Exception], names: str) -> None:
    with pytest.raises(kind) as caught, watch_processes(Process(rank, 3), make_store()):
        raise RuntimeError(CLOSED)
    assert str(caught.value).startswith(names)
    assert str(caught.value).endswith(
        "has ended or does not answer. A run can be resumed with --resume."
    )


def test_processes_that_beat_or_have_noticed_are_not_lost() -> None:
    store = make_store()
    with (
        watch_processes(Process(0, 3), store),
        pytest.raises(OtherProcessError, match=r"Lost rank 2, "),
        watch_processes(Process(1, 3), store),
    ):
        raise RuntimeError(CLOSED)
    assert store.add("beat/0", 0) > 1


def test_other_errors_remain() -> None:
    for error in (DataError("socket.png: is broken."), ValueError("nccl"), RuntimeError("other")):
        with pytest.raises(type(error)) as caught, watch_processes(Process(0, 3), make_store()):
            raise error
        assert caught.value is error


def test_a_failed_exchange_of_living_processes() -> None:
    store = make_store()
    for rank in (1, 2):
        store.add(f"noticed/{rank}", 1)
    with (
        pytest.raises(TrainingError, match="The exchange with the other processes failed: Timed"),
        watch_processes(Process(0, 3), store),
    ):
        raise RuntimeError("Timed out waiting 1800000ms for recv operation to complete")


def test_a_lost_store_is_that_of_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[int]:
        raise RuntimeError("Connection reset")

    monkeypatch.setattr(lost_processes, "_find_silent", fail)
    with (
        pytest.raises(TrainingError, match="Lost rank 0, or the machine it runs on"),
        watch_processes(Process(1, 3), make_store()),
    ):
        raise RuntimeError(CLOSED)
