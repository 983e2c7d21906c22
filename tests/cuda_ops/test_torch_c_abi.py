from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parents[2] / "cuda_ops"
TORCH_HEADERS = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>
"""


def compiles(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "declarations.cpp"
    file.write_text(source)
    include = Path(torch.__file__).parent / "include"
    return subprocess.run(
        ["g++", "-std=c++20", "-DUSE_CUDA", "-fsyntax-only", f"-I{include}",
         f"-I{SOURCES / 'include'}", str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_our_declarations_agree_with_the_headers_of_torch(tmp_path: Path) -> None:
    result = compiles(f'{TORCH_HEADERS}\n#include "torch_c_abi.h"\n', tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_wrong_declaration_is_seen(tmp_path: Path) -> None:
    wrong = 'extern "C" int32_t aoti_torch_get_dim(AtenTensorHandle, int32_t*);'
    result = compiles(f"{TORCH_HEADERS}\n{wrong}\n", tmp_path)
    assert "aoti_torch_get_dim" in result.stderr
    assert result.returncode != 0
