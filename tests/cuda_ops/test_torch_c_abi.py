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


CUBLAS_CHECK = """
#include <cublas_api.h>
#include <array>
#include "cublas_abi.h"
using namespace dcnseg_ops::cublas;
template <typename R, typename... A>
constexpr std::array<size_t, sizeof...(A)> sizes(R (*)(A...)) { return {sizeof(A)...}; }
using Overload = cublasStatus_t (*)(  // one of two overloads
    cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void*, const void*,
    cudaDataType, int, long long, const void*, cudaDataType, int, long long, const void*, void*,
    cudaDataType, int, long long, int, cublasComputeType_t, cublasGemmAlgo_t);
static_assert(sizes(static_cast<Overload>(&cublasGemmStridedBatchedEx)) == sizes(Gemm{}));
static_assert(kPlain == CUBLAS_OP_N && kTransposed == CUBLAS_OP_T);
static_assert(kDefaultAlgorithm == CUBLAS_GEMM_DEFAULT);
static_assert(kFloat32 == CUDA_R_32F && kFloat64 == CUDA_R_64F);
static_assert(kFloat16 == CUDA_R_16F && kBfloat16 == CUDA_R_16BF);
static_assert(kSumFloat32 == CUBLAS_COMPUTE_32F && kSumFloat64 == CUBLAS_COMPUTE_64F);
static_assert(kSumFromTf32 == CUBLAS_COMPUTE_32F_FAST_TF32);
static_assert(kSumExactFloat32 == CUBLAS_COMPUTE_32F_PEDANTIC);
"""


def cublas_includes() -> list[str]:
    """Possible folders of the headers of cuBLAS and of the CUDA runtime."""
    wheels = Path(torch.__file__).parents[1].glob("nvidia/*/include")
    nvcc = shutil.which("nvcc")
    toolkit = [Path("/usr/local/cuda/include")]
    toolkit += [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    return [f"-I{folder}" for folder in (*wheels, *toolkit)]


def compile_source(
    source: str, folder: Path, includes: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    file = folder / "declarations.cpp"
    file.write_text(source)
    if includes is None:
        includes = [f"-I{Path(torch.__file__).parent / 'include'}"]
    return subprocess.run(
        ["g++", "-std=c++20", "-DUSE_CUDA", "-fsyntax-only", *includes,
         f"-I{SOURCES / 'include'}", str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_declarations_agree_with_the_headers_of_torch(tmp_path: Path) -> None:
    result = compile_source(f'{TORCH_HEADERS}\n#include "torch_c_abi.h"\n', tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_wrong_declaration_is_detected(tmp_path: Path) -> None:
    wrong = 'extern "C" int32_t aoti_torch_get_dim(AtenTensorHandle, int32_t*);'
    result = compile_source(f"{TORCH_HEADERS}\n{wrong}\n", tmp_path)
    assert "aoti_torch_get_dim" in result.stderr
    assert result.returncode != 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_declarations_agree_with_the_headers_of_cublas(tmp_path: Path) -> None:
    includes = cublas_includes()
    if compile_source("#include <cublas_api.h>", tmp_path, includes).returncode != 0:
        pytest.skip("the headers of cuBLAS are not installed")
    result = compile_source(CUBLAS_CHECK, tmp_path, includes)
    assert result.returncode == 0, result.stderr
    wrong = compile_source(CUBLAS_CHECK.replace("CUDA_R_16BF", "CUDA_R_8I"), tmp_path, includes)
    assert "static assertion failed" in wrong.stderr
