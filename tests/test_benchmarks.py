"""The benchmarks run, check every contender first, and print text or JSON.

Nothing here depends on a time.
"""

from __future__ import annotations

import json
import math
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from benchmarks import (
    bench_camvid,
    bench_gpu,
    bench_huge_image,
    bench_memory,
    bench_ops,
    bench_roi,
    common,
    gpu_convolutions,
    rivals,
)
from dcnseg.ops import deform_conv2d
from tests.conftest import Invoke
from tests.ops.common import NEEDS_NATIVE

Main = Callable[[Sequence[str]], object]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _torch_settings() -> Iterator[None]:
    """Restore what the benchmarks set."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.fixture
def _no_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)


def run(main: Main, capsys: Capture, *options: str) -> str:
    main(["--quick", "--threads=1", *options])
    return capsys.readouterr().out


def run_json(main: Main, capsys: Capture, *options: str) -> Any:
    return json.loads(run(main, capsys, "--json", *options))


@pytest.mark.filterwarnings("default")  # from the rivals' imports
def test_convolution(capsys: Capture) -> None:
    result = run_json(bench_ops.main, capsys, "--rounds=1")
    forward, both = result["rows"]
    names = {bench_ops.DENSE, common.OURS, bench_ops.TORCHVISION}
    assert set(forward["contenders"]) | set(result["left_out"]) == names | set(rivals.NAMES)
    assert set(both["contenders"]) == names
    assert (forward["pass"], both["pass"]) == ("forward", "forward+backward")
    numbers = forward["contenders"][common.OURS]
    assert 0 < numbers["best"] <= numbers["median"]
    assert numbers["median_ratio"] == numbers["best_ratio"] == 1
    assert result["machine"]["threads"] == 1


def test_huge_image(capsys: Capture) -> None:
    pytest.importorskip("rasterio", reason="rasterio is not installed")
    (row,) = run_json(bench_huge_image.main, capsys, "--window=64", "--input-scale=1")["rows"]
    assert (row["height"], row["width"], row["windows"]) == (100, 100, 4)
    assert 0 < row["before_gb"] <= row["peak_gb"] < bench_huge_image.BAR_GB


@pytest.mark.usefixtures("_no_rivals")
def test_missing_rivals_are_named(capsys: Capture) -> None:
    text = run(bench_ops.main, capsys, "--rounds=1")
    for name in rivals.NAMES:
        (line,) = (line for line in text.splitlines() if name in line)
        assert line.startswith(f"left out: {name}: ")
        assert line.endswith("`pip install .[bench]` installs it")


@pytest.mark.parametrize(
    ("option", "reason", "more"),
    [
        (
            "--dtype=bfloat16",
            "compared in float32 only",
            {"torchvision": "has no bfloat16 on the CPU"},
        ),
        ("--channels-last", "takes channels-first maps only", {}),
    ],
)
def test_unsupported_inputs(
    option: str, reason: str, more: dict[str, str], capsys: Capture
) -> None:
    result = run_json(bench_ops.main, capsys, "--rounds=1", option)
    assert result["left_out"] == dict.fromkeys(rivals.NAMES, reason) | more
    assert not set(result["left_out"]) & set(result["rows"][0]["contenders"])


@pytest.mark.usefixtures("_no_rivals")
@pytest.mark.parametrize(
    ("main", "operator", "message"),
    [
        (bench_ops.main, "deform_conv2d", r"torchvision is wrong on \[1,16,9,9\]"),
        (bench_roi.main, "ps_roi_pool", "torchvision is wrong on ps_roi_pool"),
    ],
)
def test_wrong_operator_is_not_timed(
    main: Main, operator: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    right = getattr(torchvision.ops, operator)
    monkeypatch.setattr(torchvision.ops, operator, lambda *given, **named: -right(*given, **named))
    with pytest.raises(SystemExit, match=message):
        run(main, capsys, "--rounds=1")
    assert f"{operator} [1,16" not in capsys.readouterr().out


def test_wrong_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def make_zero(inputs: common.Inputs, *others: int) -> object:
        return {"OpenVINO": lambda: torch.zeros_like(inputs[0])}, {}

    monkeypatch.setattr(bench_ops, "make_rivals", make_zero)
    with pytest.raises(SystemExit, match="OpenVINO is wrong"):
        run(bench_ops.main, capsys)
    assert ", forward" not in capsys.readouterr().out


def test_roi_operators(capsys: Capture) -> None:
    result = run_json(bench_roi.main, capsys, "--rounds=1")
    contenders = {row["subject"].split(" [")[0]: set(row["contenders"]) for row in result["rows"]}
    names = "roi_pool roi_avg_pool ps_roi_pool deform_roi_pool deform_ps_roi_pool"
    assert {name.split()[0] for name in contenders} == set(names.split())
    assert contenders["roi_pool"] == contenders["ps_roi_pool"] == {common.OURS, "torchvision"}
    assert all(common.OURS in each for each in contenders.values())
    assert len(result["rows"]) == 2 * len(contenders)


def test_memory(capsys: Capture) -> None:
    result = run_json(bench_memory.main, capsys)
    names = [bench_ops.DENSE, common.OURS, bench_ops.TORCHVISION]
    assert [row["contender"] for row in result["rows"]] == 2 * names
    assert [row["backward"] for row in result["rows"]] == 3 * [False] + 3 * [True]
    ours = [row["mebibytes"] for row in result["rows"] if row["contender"] == common.OURS]
    assert all(mebibytes < result["bar_mebibytes"] for mebibytes in ours)


def test_working_memory_is_measured() -> None:
    def wasteful(input: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # A new mapping: an allocator may return memory that is already resident.
        with mmap.mmap(-1, 64 << 20) as waste:
            waste[:: mmap.PAGESIZE] = bytes(len(waste) // mmap.PAGESIZE)
        return input + 1

    inputs = torch.zeros(1, 1, 1024, 1024), torch.zeros(1), torch.zeros(1)
    # If the kernel reclaims idle pages meanwhile, a measurement gets smaller, never larger.
    measured = max(bench_memory.run(wasteful, inputs, backward=False) for _ in range(3))
    assert measured == pytest.approx(64, abs=12)


def test_statistics() -> None:
    slow, fast = common.Timing((4.0, 9.0, 6.0)), common.Timing((1.0, 3.0, 3.0))
    assert slow.ratio_to(fast) == 3  # of 4, 3 and 2
    assert (slow.best, fast.best) == (4, 1)
    assert slow.median == 6
    assert common.Timing((1.0,)).spread == 0
    truth = torch.tensor([3.0, 4.0]).double()
    assert common.relative_norm(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert math.isnan(common.worst_error([truth, truth * torch.nan, truth + 1], 3 * [truth]))


def test_contenders_alternate() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = common.alternate(contenders, rounds=2)
    per_turn = len(calls) // 6  # two contenders, two rounds and a warm-up
    assert per_turn > 1
    assert calls == 3 * (per_turn * ["a"] + per_turn * ["b"])
    assert all(len(timing.rounds) == 2 for timing in timings.values())


def test_markdown_table() -> None:
    table = common.markdown_table(("what", "value"), [("a", 1234.5), ("b", 0.01234), ("c", None)])
    assert table.endswith("| --- | --- |\n| a | 1234 |\n| b | 0.0123 |\n| c | - |")


@NEEDS_NATIVE
@pytest.mark.slow
def test_gpu_benchmark_on_the_cpu(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    bench_gpu.main(["--device=cpu", "--quick", "--rounds=1", f"--out={out}"])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert len(report["convolutions"]) == 3 * 2 * 2  # dtypes, layouts, passes
    for row in report["convolutions"]:
        assert {common.OURS, bench_ops.DENSE} <= set(row["contenders"])
        assert row["contenders"][bench_ops.DENSE]["ratio_to_dense"] == 1
        assert f"| {row['shape']} | {row['dtype']} | {row['layout']} | {row['pass']} |" in printed
    assert {row["subject"].split()[0] for row in report["regions"]} >= {"roi_pool", "ps_roi_pool"}
    (training,) = report["training"]
    assert set(training["models"]) == {"plain", "deformable v1", "deformable v2"}
    assert all(model["milliseconds"] > 0 for model in training["models"].values())
    assert "| deformable v1 |" in printed


def test_gpu_benchmark_needs_a_gpu(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "no NVIDIA GPU found; use --device cpu --quick" in capsys.readouterr().err


@NEEDS_NATIVE
def test_wrong_convolution_is_not_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any, backend: Any) -> torch.Tensor:
        factor = 1.0 if backend == "reference" else 1.1
        return deform_conv2d(*given, backend=backend) * factor

    monkeypatch.setattr(bench_ops, "deform_conv2d", wrong)
    ceilings = dict.fromkeys((*gpu_convolutions.DTYPES, "copy"), 1.0)
    bench = gpu_convolutions.Bench(torch.device("cpu"), ceilings, rounds=1)
    rows = list(gpu_convolutions.bench_convolutions(bench, quick=True))
    assert [row["contenders"] for row in rows] == [{}] * 6  # dtypes and layouts
    expected = "[2,16,9,9] dilation 2 bfloat16 channels-first: wrong, not timed, relative error 0.1"
    assert bench_gpu.wrong_rows({"convolutions": rows})[0] == expected


@pytest.fixture
def camvid(tmp_path: Path) -> list[str]:
    """The options of a small comparison whose files are in `tmp_path`."""
    options = ["--recipe=resnet18", "--epochs=2", "--tiny", "--device=cpu", "--workers=0"]
    return [str(tmp_path), f"--results={tmp_path / 'results.json'}", f"--runs={tmp_path}", *options]


def finished(job: bench_camvid.Job, mean_iou: float) -> dict[str, Any]:
    """What a run adds to the results."""
    scores = {"mean_iou": mean_iou, "pixel_accuracy": 0.9, "class_iou": {"sky": 0.5, "car": None}}
    return {
        "name": job.name,
        **vars(job),
        "seconds": 10.0,
        "commands": [["dcnseg", "train", "data"]],
        "val": {"epoch": 2, **scores},
        **dict.fromkeys(("test", "test_augmented"), scores if job.phase == "final" else None),
    }


def test_camvid_selects_on_val_before_test(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path, camvid: list[str]
) -> None:
    jobs: list[bench_camvid.Job] = []

    def run_job(job: bench_camvid.Job, options: Any) -> dict[str, Any]:
        jobs.append(job)
        if job.variant == "deformable v2":
            raise subprocess.CalledProcessError(1, "dcnseg", stderr="out of memory")
        return finished(job, 0.5 + 0.01 * (job.dilation == bench_camvid.DILATIONS[1]))

    monkeypatch.setattr(bench_camvid, "run_job", run_job)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench_camvid.BEGIN}\nold\n{bench_camvid.END}\nafter\n")
    options = [*camvid, "--seeds=2", f"--page={page}"]
    assert bench_camvid.main(options) == 1
    captured = capsys.readouterr()
    assert "final-deformable-v2-resnet18-2-seed0 failed: out of memory" in captured.err
    assert "| plain, resnet18, 2 epochs | 2 | 50.00 ± 0.00 |" in captured.out
    assert "old" not in page.read_text()
    assert captured.out.strip() in page.read_text()
    final = [job for job in jobs if job.phase == "final"]
    assert {job.dilation for job in final if job.variant == "dilated"} == {6}
    assert {job.seed for job in final} == {0, 1}
    assert {job.seed for job in jobs if job.phase != "final"} == {bench_camvid.SEARCH_SEED}
    assert len({job.name for job in jobs}) == len(jobs) == 3 + 2 * 4
    # A second call repeats only what failed.
    jobs.clear()
    assert bench_camvid.main(options) == 1
    assert {job.variant for job in jobs} == {"deformable v2"}


def test_camvid_compares_recipes_on_val(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, camvid: list[str]
) -> None:
    monkeypatch.setattr(bench_camvid, "run_job", lambda job, options: finished(job, 0.5))
    assert bench_camvid.main([*camvid, "--search=resnet18,resnet34-sgd"]) == 0
    assert "| recipes-plain-resnet34-sgd-2-seed100 | 2 | 10 | 50.00 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_camvid.main([*camvid, "--search=resnet18,vgg"])
    assert "--search: unknown vgg; expected resnet50" in capsys.readouterr().err


def test_camvid_resumes_an_interrupted_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, camvid: list[str]
) -> None:
    job = bench_camvid.Job("recipes", "plain", "resnet18", epochs=2, seed=0)
    folder = tmp_path / job.name
    folder.mkdir()
    (folder / "last.ckpt").touch()
    commands: list[list[str]] = []

    def call(command: list[str], options: Any) -> str:
        commands.append(command)
        (folder / "metrics.jsonl").write_text('{"epoch": 2, "mean_iou": 0.5, "seconds": 3}\n')
        return ""

    monkeypatch.setattr(bench_camvid, "call", call)
    result = bench_camvid.run_job(job, bench_camvid.make_parser().parse_args(camvid))
    assert [command[1:4] for command in commands] == [["train", "--resume", str(folder)]]
    assert result["val"]["mean_iou"] == 0.5


@pytest.mark.slow
def test_camvid_run_is_evaluated_and_not_repeated(
    scenes: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, camvid: list[str]
) -> None:
    options = bench_camvid.make_parser().parse_args([str(scenes), *camvid[1:]])
    assert bench_camvid.call(["dcnseg", "--version"], options).startswith("dcnseg ")
    commands: list[str] = []

    def call(command: list[str], options: Any) -> str:
        commands.append(command[1])
        result = invoke(*command[1:])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    monkeypatch.setattr(bench_camvid, "call", call)
    job = bench_camvid.Job("final", "plain", "resnet18", epochs=1, seed=0, tiny=True)
    result = bench_camvid.run_job(job, options)
    assert commands == ["train", "evaluate", "evaluate"]
    assert result["test"].keys() == result["test_augmented"].keys()
    assert result["metrics"][0]["epoch"] == result["val"]["epoch"] == 1
    assert bench_camvid.run_job(job, options)["metrics"] == result["metrics"]
    assert commands[3:] == ["evaluate", "evaluate"]
