"""The benchmarks run, check every contender first, and print what people and programs can read.

Nothing here looks at a time.
"""

from __future__ import annotations

import json
import mmap
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from benchmarks import (
    bench_gpu,
    bench_memory,
    bench_ops,
    bench_roi,
    common,
    gpu_check,
    rivals,
)
from benchmarks.camvid import __main__ as camvid
from benchmarks.camvid.plan import DILATIONS, SEARCH_SEED, Plan
from benchmarks.camvid.report import BEGIN, END, curves_svg, fill_page, to_markdown
from benchmarks.camvid.run import Results, RunFailedError, run_job
from benchmarks.gpu import checks, convolutions
from benchmarks.gpu.large_checks import MANY_COLUMNS, MANY_INPUTS
from benchmarks.gpu.operator_cases import Convolution, make_cases, odd_sixteenths
from benchmarks.gpu.other_architecture import NO_ARCHITECTURE, architectures, write_for_no_gpu
from dcnseg.ops import deform_conv2d

Main = Callable[[Sequence[str]], object]
Capture = pytest.CaptureFixture[str]


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
        # Mapped anew: an allocator may give memory that earlier tests used, and that is resident.
        with mmap.mmap(-1, 64 << 20) as waste:
            waste[:: mmap.PAGESIZE] = bytes(len(waste) // mmap.PAGESIZE)
        return input + 1

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


@pytest.fixture
def kept_tf32() -> Iterator[None]:
    """Give back what the benchmark for GPUs allows."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


def check_on_cpu(capsys: Capture, *options: str) -> tuple[int, dict[str, Any]]:
    status = gpu_check.main(["--device=cpu", "--quick", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of some versions of torch while they compile
def test_checks_of_a_gpu_run_on_the_cpu(capsys: Capture) -> None:
    status, report = check_on_cpu(capsys)
    checks = {check["name"]: check for check in report["checks"]}
    assert status == 0, [check for check in checks.values() if check["status"] == "FAIL"]
    assert {check["status"] for check in checks.values()} == {"PASS", "left out"}
    needing = {name for name, check in checks.items() if check["detail"] == "needs a GPU"}
    assert "stream of the caller" in needing
    assert {"deform_conv2d float32", "two threads", "deterministic algorithms"} <= set(checks)
    assert not {"deform_conv2d float32", "two threads", "deterministic algorithms"} & needing
    assert report["machine"]["device"].startswith("cpu: a dry run")


@pytest.mark.parametrize(
    ("only", "reason"),
    [
        ("deform_conv2d float32", "error 0.01"),
        ("gradcheck of deform_conv2d", "Backward is not reentrant"),
        ("deterministic", "gradient of input differs between two runs"),
        ("NaN", "Tensor-likes are not close"),
    ],
)
def test_an_operator_that_is_wrong_fails(
    only: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    class Wrong(torch.autograd.Function):
        """A hundredth too much, and in the gradient something else every time."""

        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value * 1.01

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * torch.rand(())

    call = Convolution.call

    def wrong_call(self: Any, backend: Any, tensors: Any) -> torch.Tensor:
        output = call(self, backend, tensors)
        made: torch.Tensor = output if backend == "reference" else Wrong.apply(output)
        return made

    monkeypatch.setattr(Convolution, "call", wrong_call)
    status, report = check_on_cpu(capsys, f"--only={only}")
    assert status == 1
    failed = [check["detail"] for check in report["checks"] if check["status"] == "FAIL"]
    assert any(reason in detail for detail in failed), failed


def test_a_check_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "no NVIDIA GPU here; --device cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "no NVIDIA GPU here; --device cpu --quick" in capsys.readouterr().err


def test_cases_are_the_same_numbers_in_every_dtype() -> None:
    for case in make_cases(quick=True):
        for dtype in (torch.bfloat16, torch.float16):
            tensors = case.make(dtype)
            assert all(torch.equal(t.double().to(t.dtype), t) for t in tensors.values())
    values = odd_sixteenths(torch.randn(1000))
    assert torch.equal(values.bfloat16().float(), values)
    assert torch.equal((16 * values) % 2, torch.ones(1000))


def test_large_cases_do_not_fit_into_32_bits() -> None:
    assert MANY_COLUMNS.columns > 2**31
    assert MANY_INPUTS.channels * MANY_INPUTS.size**2 > 2**31


def test_errors_are_relative_and_nan_never_passes() -> None:
    truth = torch.tensor([3.0, 4.0]).double()
    assert checks.relative_norm(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    with pytest.raises(checks.CheckFailedError, match="output is off by nan"):
        checks.require_close({"output": truth * torch.nan}, {"output": truth})


def test_a_library_for_no_gpu_differs_in_nothing_but_that(tmp_path: Path) -> None:
    def entry(kind: int, architecture: int, content: bytes) -> bytes:
        header = struct.pack("<HHIQ", kind, 0x101, 64, len(content)).ljust(28, b"?")
        return (header + struct.pack("<I", architecture)).ljust(64, b"?") + content

    entries = entry(2, 90, b"machine code") + entry(1, 120, b"PTX for all that follow")
    container = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    library, copy = tmp_path / "library.so", tmp_path / "copy.so"
    library.write_bytes(b"before" + container + b"between" + container + b"after")
    assert architectures(library) == {90, 120}
    assert write_for_no_gpu(library, copy) == 4
    assert architectures(copy) == {NO_ARCHITECTURE}
    changed = sum(a != b for a, b in zip(library.read_bytes(), copy.read_bytes(), strict=True))
    assert changed == 4 * 2  # 999 takes two bytes


@pytest.mark.slow
@pytest.mark.usefixtures("kept_tf32")
def test_benchmark_of_a_gpu_runs_on_the_cpu(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    bench_gpu.main(["--device=cpu", "--quick", "--rounds=1", f"--out={out}"])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert len(report["convolutions"]) == 3 * 2 * 2  # dtypes, layouts, passes
    for row in report["convolutions"]:
        assert {common.OURS, convolutions.DENSE} <= set(row["contenders"])
        assert row["contenders"][convolutions.DENSE]["ratio_to_dense"] == 1
        assert f"| {row['shape']} | {row['dtype']} | {row['layout']} | {row['pass']} |" in printed
    assert {row["subject"].split()[0] for row in report["regions"]} >= {"roi_pool", "ps_roi_pool"}
    (training,) = report["training"]
    assert set(training["models"]) == {"plain", "deformable v1", "deformable v2"}
    assert all(model["milliseconds"] > 0 for model in training["models"].values())
    assert "| deformable v1 |" in printed


def test_wrong_convolution_is_never_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*all: Any, backend: Any, **named: Any) -> torch.Tensor:
        right = deform_conv2d(*all, backend=backend, **named)
        return right * (1.0 if backend == "reference" else 1.1)

    monkeypatch.setattr(convolutions, "deform_conv2d", wrong)
    ceilings = dict.fromkeys((*convolutions.DTYPES, "copy"), 1.0)
    bench = convolutions.Bench(torch.device("cpu"), ceilings, rounds=1)
    rows = list(convolutions.bench_convolutions(bench, quick=True))
    assert [row["contenders"] for row in rows] == [{}] * 6  # dtypes and layouts
    said = bench_gpu.wrong_rows({"convolutions": rows})
    assert said[1] == "[2,16,9,9] d2 bfloat16 contiguous: wrong, not timed, relative error 0.1"


def test_markdown_table() -> None:
    table = common.markdown_table(("what", "value"), [("a", 1234.5), ("b", 0.01234), ("c", None)])
    assert table.splitlines() == [
        "| what | value |",
        "| --- | --- |",
        "| a | 1234 |",
        "| b | 0.0123 |",
        "| c | - |",
    ]


def finished(job: Any, mean_iou: float) -> dict[str, Any]:
    """What a run leaves in the results."""
    scores = {"mean_iou": mean_iou, "pixel_accuracy": 0.9, "class_iou": {"sky": 0.5, "car": None}}
    record = {"epoch": 2, "mean_iou": mean_iou}
    is_final = job.phase == "final"
    return {
        "name": job.name,
        **vars(job),
        "seconds": 10.0,
        "parallel": 1,
        "commands": [["dcnseg", "train", "data"]],
        "val": {**record, **scores},
        "test": scores if is_final else None,
        "test_augmented": scores if is_final else None,
        "metrics": [{"epoch": 1, "loss": 1.0}, record],
    }


def test_plan_chooses_on_val_before_anything_is_scored_on_test() -> None:
    plan = Plan("resnet18", epochs=2, seeds=2)
    runs: list[dict[str, Any]] = []
    phases = []
    while (job := next(plan.open_jobs(runs), None)) is not None:
        phases.append(job.phase)
        runs.append(finished(job, 0.5 + 0.01 * (job.dilation == DILATIONS[1])))
    assert phases == ["dilations"] * len(DILATIONS) + ["final"] * 8
    final = [run for run in runs if run["phase"] == "final"]
    assert {run["dilation"] for run in final if run["variant"] == "dilated"} == {DILATIONS[1]}
    assert {run["seed"] for run in final} == {0, 1}
    assert {run["seed"] for run in runs if run["phase"] != "final"} == {SEARCH_SEED}
    assert len({run["name"] for run in runs}) == len(runs)
    tables = to_markdown(runs)
    assert "| plain, resnet18, 2 epochs | 2 | 50.00 ± 0.00 |" in tables
    assert curves_svg(runs).count("<polyline") == len(final)


def test_recipes_are_compared_alone_and_on_val(capsys: Capture, tmp_path: Path) -> None:
    jobs = list(Plan("resnet18", 2, 3, search=("resnet18", "resnet34-sgd")).open_jobs([]))
    assert [(job.phase, job.recipe) for job in jobs] == [
        ("recipes", "resnet18"),
        ("recipes", "resnet34-sgd"),
    ]
    options = jobs[1].options()
    assert options[options.index("--optimizer") + 1] == "sgd"
    with pytest.raises(SystemExit):
        camvid.main([f"--results={tmp_path / 'none.json'}", "--search=resnet18,vgg"])
    assert "there is no vgg" in capsys.readouterr().err


def test_page_keeps_all_but_its_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill_page(page, to_markdown([]))
    assert page.read_text() == f"before\n{BEGIN}\n\nNot yet run on a GPU.\n\n{END}\nafter\n"


@pytest.mark.slow
def test_a_run_is_trained_scored_and_kept(scenes: Path, tmp_path: Path, capsys: Capture) -> None:
    results = tmp_path / "results.json"
    common_options = [f"--results={results}", f"--runs={tmp_path / 'runs'}", "--tiny"]
    options = [*common_options, "--epochs=1", "--seeds=1", "--device=cpu", "--workers=0"]
    # The second of two calls has no time for more; nothing is repeated.
    job = next(job for job in Plan("resnet18", 1, 1, tiny=True).open_jobs([]) if job.seed == 0)
    parsed = camvid.make_parser().parse_args([str(scenes), *options])
    run_job(job, scenes, tmp_path / "runs", Results.read(results, parsed), Forever())
    assert camvid.main([str(scenes), *options, "--recipe=resnet18", "--minutes=0"]) == 0
    (run,) = json.loads(results.read_text())["runs"]
    assert run["variant"] == "plain"
    assert run["test"].keys() == run["test_augmented"].keys()
    assert run["metrics"][0]["epoch"] == run["val"]["epoch"] == 1
    printed = capsys.readouterr().out
    assert "| plain, resnet18, 1 epochs | 1 |" in printed
    assert "open: dilations-dilated-4-resnet18-1-seed100" in printed
    assert "final-plain" not in printed.rpartition("open:")[2]


class Forever:
    seconds_left = 600.0


class Never:
    seconds_left = 0.0


def test_a_run_whose_time_is_up_leaves_nothing(scenes: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    parsed = camvid.make_parser().parse_args([f"--results={path}"])
    job = next(Plan("resnet18", 1, 1, tiny=True).open_jobs([]))
    with pytest.raises(RunFailedError, match="the time was up"):
        run_job(job, scenes, tmp_path / "runs", Results.read(path, parsed), Never())
    assert not path.exists()
