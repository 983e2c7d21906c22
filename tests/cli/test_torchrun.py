"""`torchrun -m dcnseg_cli`, which restarts the processes of a run if one of them is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import read_run
from tests.conftest import SMALL_TRAINING

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_continues(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = (*SMALL_TRAINING, "--epochs=3", "--checkpoint-minutes=0.0001")
    command = (*TORCHRUN, "--max-restarts=1", "-m", "dcnseg_cli", "train", scenes, "--out", run)
    with subprocess.Popen(
        [sys.executable, *map(str, command), *options],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        lines = []
        killed = None
        for line in process.stderr:
            lines.append(line)
            if killed is None and line.startswith("epoch 1/3"):
                killed = find_rank(1, process.pid)
                os.kill(killed, signal.SIGKILL)
        result = process.stdout.read()
    messages = "".join(lines)
    assert process.returncode == 0, messages
    assert result.split() == [str(run)]
    assert re.search(rf"\[rank 0, process .*\] Error: Lost rank 1, process {killed} on", messages)
    assert f"torchrun has restarted the processes; {run} is resumed." in messages
    assert [record["epoch"] for record in read_metrics(run)] == [1, 2, 3]
    assert read_run(run).command[:2] == ["dcnseg", "train"]
    assert (run / "report.html").is_file()


def find_rank(rank: int, torchrun: int) -> int:
    """The id of a process that torchrun has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if parent and int(parent[1]) == torchrun and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"no process has rank {rank}")
