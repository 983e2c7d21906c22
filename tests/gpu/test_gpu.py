"""The checks of this folder on a GPU, and a dry run of them on the CPU."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import odd_sixteenths
from tests.gpu.__main__ import main
from tests.gpu.cases import Convolution, make_cases
from tests.gpu.checks import Check, make_checks, require_close
from tests.gpu.large import MANY_COLUMNS, MANY_INPUTS, make_large_checks
from tests.gpu.machine_code import NO_ARCHITECTURE, read_architectures, write_for_no_gpu
from tests.gpu.processes import make_process_checks
from tests.ops.common import NEEDS_NATIVE

Capture = pytest.CaptureFixture[str]
CHECKS = [
    *make_checks(quick=False),
    *make_large_checks(),
    *make_process_checks(quick=False),
]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # some versions of torch warn while compiling
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_gpu(check: Check) -> None:
    check.run(torch.device("cuda"))


def run_on_cpu(capsys: Capture, *options: str) -> tuple[int, dict[str, Any]]:
    status = main(["--device=cpu", "--quick", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


@NEEDS_NATIVE
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # some versions of torch warn while compiling
def test_dry_run_on_the_cpu(capsys: Capture) -> None:
    status, report = run_on_cpu(capsys)
    checks = {check["name"]: check for check in report["checks"]}
    assert status == 0, [check for check in checks.values() if check["status"] == "FAIL"]
    assert {check["status"] for check in checks.values()} == {"PASS", "left out"}
    skipped = {name for name, check in checks.items() if check["detail"] == "needs a GPU"}
    assert "stream of the caller" in skipped
    run = {"deform_conv2d float32", "two threads", "deterministic algorithms"}
    assert run <= set(checks) - skipped
    assert report["machine"]["device"].startswith("cpu: a dry run")


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("only", "reason"),
    [
        ("deform_conv2d float32", "error 0.01"),
        ("gradcheck of deform_conv2d", "Backward is not reentrant"),
        ("deterministic", "gradient of input differs between two runs"),
        ("NaN", "Tensor-likes are not close"),
    ],
)
def test_wrong_operator_fails(
    only: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    class Wrong(torch.autograd.Function):
        """One percent too much, and a random gradient."""

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
    status, report = run_on_cpu(capsys, f"--only={only}")
    assert status == 1
    failed = [check["detail"] for check in report["checks"] if check["status"] == "FAIL"]
    assert any(reason in detail for detail in failed), failed


def test_missing_gpu_is_reported(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "no NVIDIA GPU found; use --device cpu" in capsys.readouterr().err


def test_cases_have_the_same_values_in_every_dtype() -> None:
    for case in make_cases(quick=True):
        for dtype in (torch.bfloat16, torch.float16):
            tensors = case.make(dtype)
            assert all(torch.equal(t.double().to(t.dtype), t) for t in tensors.values())
    values = odd_sixteenths(torch.randn(1000))
    assert torch.equal(values.bfloat16().float(), values)
    assert torch.equal((16 * values) % 2, torch.ones(1000))


def test_large_cases_exceed_32_bits() -> None:
    assert MANY_COLUMNS.columns > 2**31
    assert MANY_INPUTS.channels * MANY_INPUTS.size**2 > 2**31


def test_nan_never_passes() -> None:
    truth = torch.tensor([3.0, 4.0]).double()
    with pytest.raises(AssertionError, match="output is off by nan"):
        require_close({"output": truth * torch.nan}, {"output": truth})


def test_library_for_no_gpu_differs_only_in_architectures(tmp_path: Path) -> None:
    def entry(kind: int, architecture: int, content: bytes) -> bytes:
        header = struct.pack("<HHIQ", kind, 0x101, 64, len(content)).ljust(28, b"?")
        return (header + struct.pack("<I", architecture)).ljust(64, b"?") + content

    entries = entry(2, 90, b"machine code") + entry(1, 120, b"PTX for newer GPUs")
    container = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    library, copy = tmp_path / "library.so", tmp_path / "copy.so"
    library.write_bytes(b"before" + container + b"between" + container + b"after")
    assert read_architectures(library) == {90, 120}
    assert write_for_no_gpu(library, copy) == 4
    assert read_architectures(copy) == {NO_ARCHITECTURE}
    changed = sum(a != b for a, b in zip(library.read_bytes(), copy.read_bytes(), strict=True))
    assert changed == 4 * 2  # 999 takes two bytes
