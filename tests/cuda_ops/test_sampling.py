from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "cuda_ops"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_sampling_equals_plain_loops_and_stays_inside_memory(tmp_path: Path) -> None:
    """The CPU operator's own source under the sanitizers, with NaN, infinite and far offsets."""
    program = tmp_path / "sampling_check"
    built = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=all", "-DDCN_CLONES=", "-Wno-psabi", f"-I{SOURCES}",
         f"-I{SOURCES / 'include'}", str(HERE / "sampling_check.cpp"), "-o", str(program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
