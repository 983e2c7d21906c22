"""The benchmarks run, check every contender first, and print what people and programs can read.

Nothing here looks at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torchvision

from benchmarks import bench_memory, bench_ops, bench_roi, common, rivals

Main = Callable[[Sequence[str]], None]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Give back the number of threads that the benchmarks set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where neither rival is installed."""
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)


def run(main: Main, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    main(["--quick", "--threads=1", *options])
    return capsys.readouterr().out


def run_json(main: Main, capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    return json.loads(run(main, capsys, "--json", *options))


@pytest.mark.filterwarnings("default")  # of the rivals' own imports
def test_convolution(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(bench_ops.main, capsys, "--rounds=1")
    forward, both = result["rows"]
    ours = {bench_ops.DENSE, common.OURS, "torchvision"}
    assert set(forward["contenders"]) | set(result["left_out"]) == ours | set(rivals.NAMES)
    assert set(both["contenders"]) == ours
    assert (forward["pass"], both["pass"]) == ("forward", "forward+backward")
    numbers = forward["contenders"][common.OURS]
    assert 0 < numbers["best"] <= numbers["median"]
    assert numbers["median_ratio"] == numbers["best_ratio"] == 1
    assert result["machine"]["threads"] == 1


@pytest.mark.usefixtures("no_rivals")
def test_rivals_that_are_not_installed_are_left_out_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = run(bench_ops.main, capsys, "--rounds=1")
    for name in rivals.NAMES:
        (line,) = (line for line in text.splitlines() if name in line)
        assert line.startswith(f"left out: {name}: ")
        assert line.endswith("`pip install .[bench]` installs it")


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (
            ["--dtype=bfloat16"],
            dict.fromkeys(rivals.NAMES, "compared in float32 only")
            | {"torchvision": "has no bfloat16 on the CPU"},
        ),
        (["--channels-last"], dict.fromkeys(rivals.NAMES, "takes channels-first maps only")),
    ],
)
def test_contenders_without_such_maps_are_left_out(
    options: list[str], reasons: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run_json(bench_ops.main, capsys, "--rounds=1", *options)
    assert result["left_out"] == reasons
    assert not set(reasons) & set(result["rows"][0]["contenders"])


@pytest.mark.usefixtures("no_rivals")
def test_wrong_convolution_is_never_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = torchvision.ops.deform_conv2d
    monkeypatch.setattr(torchvision.ops, "deform_conv2d", lambda *all: right(*all) + 1)
    with pytest.raises(SystemExit, match=r"torchvision is wrong on \[1,16,9,9\]"):
        run(bench_ops.main, capsys)
    assert "forward" not in capsys.readouterr().out


def test_wrong_rival_is_never_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_zero(inputs: tuple[torch.Tensor, ...], *others: int) -> object:
        return {"OpenVINO": lambda: torch.zeros_like(inputs[0])}, {}

    monkeypatch.setattr(bench_ops, "make_rivals", make_zero)
    with pytest.raises(SystemExit, match="OpenVINO is wrong"):
        run(bench_ops.main, capsys)


def test_roi_operators(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(bench_roi.main, capsys, "--rounds=1")
    contenders = {row["subject"].split(" [")[0]: set(row["contenders"]) for row in result["rows"]}
    assert {name.split()[0] for name in contenders} == {
        "roi_pool",
        "roi_avg_pool",
        "ps_roi_pool",
        "deform_roi_pool",
        "deform_ps_roi_pool",
    }
    assert contenders["roi_pool"] == contenders["ps_roi_pool"] == {common.OURS, "torchvision"}
    assert all(common.OURS in each for each in contenders.values())
    assert len(result["rows"]) == 2 * len(contenders)


def test_wrong_roi_operator_is_never_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = torchvision.ops.ps_roi_pool
    monkeypatch.setattr(torchvision.ops, "ps_roi_pool", lambda *all, **named: -right(*all, **named))
    with pytest.raises(SystemExit, match="ps_roi_pool of torchvision is wrong"):
        run(bench_roi.main, capsys, "--rounds=1")


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(bench_memory.main, capsys)
    names = [bench_ops.DENSE, common.OURS, "torchvision"]
    assert [row["contender"] for row in result["rows"]] == 2 * names
    assert [row["backward"] for row in result["rows"]] == 3 * [False] + 3 * [True]
    ours = [row["mebibytes"] for row in result["rows"] if row["contender"] == common.OURS]
    assert all(mebibytes < result["bar_mebibytes"] for mebibytes in ours)


def test_memory_counts_what_a_call_needs() -> None:
    def wasteful(input: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        waste = torch.ones(16 << 20)  # 64 MiB: more than an allocator keeps for the next one
        return input + 0 * waste.sum()

    inputs = torch.zeros(1, 1, 1024, 1024), torch.zeros(1), torch.zeros(1)
    # A kernel that takes idle pages back meanwhile makes a measurement smaller, never larger.
    measured = max(bench_memory.run(wasteful, inputs, backward=False) for _ in range(3))
    assert measured == pytest.approx(64, abs=12)


def test_ratios() -> None:
    slow, fast = common.Timing((4.0, 9.0, 6.0)), common.Timing((1.0, 3.0, 3.0))
    assert slow.ratio_to(fast) == 3  # of 4, 3 and 2
    assert slow.best_ratio_to(fast) == 4
    assert slow.median == 6
    assert common.Timing((1.0,)).spread == 0


def test_contenders_alternate() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = common.alternate(contenders, rounds=2)
    per_turn = len(calls) // 6  # two contenders, two rounds and one that is not counted
    assert per_turn > 1
    assert calls == 3 * (per_turn * ["a"] + per_turn * ["b"])
    assert all(len(timing.rounds) == 2 for timing in timings.values())
