"""Compiles the operators' source into the programs of this folder and runs them with sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "cuda_ops"
SANITIZERS = {
    "memory": ["-fsanitize=address,undefined", "-fsanitize=float-cast-overflow",
               "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}  # fmt: skip
EMULATED_PAIRS = ["-include", str(HERE / "emulated_pairs.h")]
CONVOLUTION_SOURCES = (
    *("conv/deform_conv2d.cpp", "conv/deform_conv2d_backward.cpp", "gemm/microkernel.cpp"),
)
CONVOLUTION = [
    "-O0",  # overrides -O1, which takes nearly a minute to compile
    "-DDCN_CLONES=",
    *EMULATED_PAIRS,
    *(str(SOURCES / "cpu" / name) for name in CONVOLUTION_SOURCES),
]
CUDA_CONVOLUTION = ["-O0", "-rdynamic"]  # the GEMM is looked up by name
# Number of convolutions of conv_check and the seed, such as "5000 7"; see cuda_ops/README.md.
CONV_CHECK = os.environ.get("DCNSEG_CONV_CHECK", "").split()
PROGRAMS = [  # fast; SLOW_PROGRAMS take at least half a minute
    ("steps_check", "memory", []),
    ("halves_check", "memory", ["-DDCN_CLONES="]),
    ("scratch_check", "threads", []),  # the memory sanitizer build does not reuse memory
    ("roi_check", "memory", ["-O0", "-DDCN_CLONES="]),
    ("roi_kernels_check", "threads", []),
]
SLOW_PROGRAMS = [
    ("conv_check", "memory", CONVOLUTION),  # the CPU operators
    # An older CPU and little memory, in one build, which takes half a minute.
    ("conv_check", "memory", [*CONVOLUTION, "-DDCN_LITTLE_MEMORY", "-DDCN_MAX_LEVEL=1"]),
    ("conv_check", "threads", [*CONVOLUTION, "-DDCN_LITTLE_MEMORY"]),
    ("microkernel_check", "memory", EMULATED_PAIRS),
    ("kernels_check", "memory", CUDA_CONVOLUTION),  # the CUDA operators, run on host threads
    ("kernels_check", "memory", [*CUDA_CONVOLUTION, "-DDCN_LITTLE_MEMORY"]),
    ("kernels_check", "threads", CUDA_CONVOLUTION),
    ("fused_check", "memory", ["-O0"]),
    ("fused_check", "threads", []),
    ("roi_kernels_check", "memory", ["-O0"]),
]
NOT_ENOUGH_MEMORY = 77  # returned by index_check

FUSED_FAULTS = [  # synchronization of the fused forward, removed or wrong
    ("memory", "wait_for_copies<0>();", ""),
    ("memory", "wait_for_products<0>();", ""),
    ("memory", "Multiplier::publish();", ""),
    ("memory", "((vector ^ row % 8) << 4)", "((vector ^ row % 4) << 4)"),
    ("threads", "wait_for(shared.full + place.stage, place.parity);", ""),
]

STEP_FAULTS = [  # too many plans at once; groups with other steps than the first one
    ("plans = std::max(plans, ", "plans = std::min(plans, "),
    ("steps[group].push_back(", "if (group == 0 || round == 0) steps[group].push_back("),
]


def with_fault(files: str, right: str, wrong: str, folder: Path) -> Path:
    """Return a copy of the sources with one fault; `files` is a glob pattern."""
    sources = folder / "cuda_ops"
    shutil.copytree(SOURCES, sources)
    (file,) = (file for file in sources.glob(files) if right in file.read_text())
    text = file.read_text()
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    return sources


def compile_program(
    source: Path, program: Path, flags: list[str], sources: Path = SOURCES
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", "-Wno-psabi", "-pthread", *flags,
         f"-I{sources}", f"-I{sources / 'include'}", f"-I{HERE}", str(source), "-o", str(program)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def run_program(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)


@cache
def missing(sanitizer: str, folder: Path) -> str | None:
    """Return why programs with a sanitizer cannot be built or run here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    source, program = folder / "nothing.cpp", folder / f"nothing_{sanitizer}"
    source.write_text("int main() { return 0; }")
    built = compile_program(source, program, SANITIZERS[sanitizer])
    if built.returncode != 0:
        return f"g++ does not support this sanitizer: {built.stderr}"
    result = run_program(program)
    return (
        None
        if result.returncode == 0
        else f"programs with this sanitizer do not run here: {result.stderr}"
    )


def build(
    name: str,
    sanitizer: str,
    flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    sources: Path = SOURCES,
) -> Path:
    """Build a program with a sanitizer in a new folder; skip the test if that is not possible."""
    reason = missing(sanitizer, tmp_path_factory.getbasetemp())
    if reason is not None:
        pytest.skip(reason)
    program = tmp_path_factory.mktemp(name) / name
    built = compile_program(
        HERE / f"{name}.cpp", program, [*SANITIZERS[sanitizer], *flags], sources
    )
    assert built.returncode == 0, built.stderr
    return program


@pytest.mark.parametrize(
    ("program", "sanitizer", "flags"),
    [*PROGRAMS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_PROGRAMS)],
)
def test_equals_plain_loops_without_invalid_accesses(
    program: str, sanitizer: str, flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Covers NaN, infinite and large offsets, invalid boxes, and buffers of exactly their size."""
    arguments = CONV_CHECK if program == "conv_check" else []
    result = run_program(build(program, sanitizer, flags, tmp_path_factory), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("right", "wrong"), STEP_FAULTS)
def test_fault_of_the_steps_is_detected(
    right: str, wrong: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sources = with_fault("cpu/conv/depth_steps.h", right, wrong, tmp_path)
    result = run_program(build("steps_check", "memory", [], tmp_path_factory, sources))
    assert result.returncode != 0


@pytest.mark.parametrize("kernel", ["one_block", "two_blocks", "shared_memory"])
def test_race_is_detected(kernel: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    right = run_program(build("race_check", "threads", [], tmp_path_factory), kernel)
    assert right.returncode == 0, right.stderr
    racy = run_program(build("race_check", "threads", ["-DRACY"], tmp_path_factory), kernel)
    assert "data race" in racy.stderr
    assert racy.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "right", "wrong"), FUSED_FAULTS)
def test_fault_of_the_fused_forward_is_detected(
    sanitizer: str,
    right: str,
    wrong: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    sources = with_fault("cuda/conv/fused_*.cuh", right, wrong, tmp_path)
    result = run_program(
        build("fused_check", sanitizer, ["-O0", "-DDCN_FEW_KINDS"], tmp_path_factory, sources)
    )
    assert result.returncode != 0


def test_more_than_2_to_the_31_elements(tmp_path_factory: pytest.TempPathFactory) -> None:
    result = run_program(build("index_check", "memory", [], tmp_path_factory))
    if result.returncode == NOT_ENOUGH_MEMORY:
        pytest.skip("this machine does not overcommit memory")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "cuda/conv/taps.cuh",
        "cuda/transposes.cuh",
        "cuda/roi/roi_common.cuh",
        "cuda/roi/deform_roi_pool.cuh",
    ],
)
def test_32_bit_index_is_detected(
    file: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sources = tmp_path / "cuda_ops"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert "int64_t" in text
    (sources / file).write_text(text.replace("int64_t", "int32_t"))
    program = build("index_check", "memory", ["-Wno-narrowing"], tmp_path_factory, sources)
    result = run_program(program)
    if result.returncode == NOT_ENOUGH_MEMORY:
        pytest.skip("this machine does not overcommit memory")
    assert result.returncode != 0
