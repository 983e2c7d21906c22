from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "cuda_ops"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("sampling_check", ["-DDCN_CLONES="]),  # the CPU operator
        ("kernels_check", []),  # the CUDA kernels, run on host threads
    ],
)
def test_equals_plain_loops_and_stays_inside_memory(
    program: str, flags: list[str], tmp_path: Path
) -> None:
    """The operators' own source under the sanitizers, with NaN, infinite and far offsets."""
    built = subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined",
         "-fsanitize=float-cast-overflow", "-fno-sanitize-recover=all", "-Wno-psabi", "-pthread",
         *flags, f"-I{SOURCES}", f"-I{SOURCES / 'include'}", str(HERE / f"{program}.cpp"),
         "-o", str(tmp_path / program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(tmp_path / program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
