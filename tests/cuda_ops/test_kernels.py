"""The operators' own source, compiled with sanitizers into the programs beside this file."""

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
    "-O0",  # the last one counts: -O1 takes the compiler most of a minute
    "-DDCN_CLONES=",
    *EMULATED_PAIRS,
    *(str(SOURCES / "cpu" / name) for name in CONVOLUTION_SOURCES),
]
CUDA_CONVOLUTION = ["-O0", "-rdynamic"]  # the library's product is looked up by its name
# Number of convolutions of conv_check and their seed, as in "5000 7"; see cuda_ops/README.md.
CONV_CHECK = os.environ.get("DCNSEG_CONV_CHECK", "").split()
PROGRAMS = [  # the quick ones; SLOW_PROGRAMS take half a minute and more
    ("steps_check", "memory", []),
    ("halves_check", "memory", ["-DDCN_CLONES="]),
    ("scratch_check", "threads", []),  # with the other sanitizer it keeps nothing
    ("roi_check", "memory", ["-O0", "-DDCN_CLONES="]),
    ("roi_kernels_check", "threads", []),
]
SLOW_PROGRAMS = [
    ("conv_check", "memory", CONVOLUTION),  # the CPU operators
    # As on an older machine, and with little memory: one build of both, which takes half a minute.
    ("conv_check", "memory", [*CONVOLUTION, "-DDCN_LITTLE_MEMORY", "-DDCN_MOST_LEVEL=1"]),
    ("conv_check", "threads", [*CONVOLUTION, "-DDCN_LITTLE_MEMORY"]),
    ("microkernel_check", "memory", EMULATED_PAIRS),
    ("kernels_check", "memory", CUDA_CONVOLUTION),  # the CUDA operators, run on host threads
    ("kernels_check", "memory", [*CUDA_CONVOLUTION, "-DDCN_LITTLE_MEMORY"]),
    ("kernels_check", "threads", CUDA_CONVOLUTION),
    ("fused_check", "memory", ["-O0"]),
    ("fused_check", "threads", []),
    ("roi_kernels_check", "memory", ["-O0"]),
]
NO_SUCH_MEMORY = 77  # what index_check returns


FUSED_FAULTS = [  # what the threads of the fused forward owe each other, left out or done wrong
    ("memory", "wait_for_copies<0>();", ""),
    ("memory", "wait_for_products<0>();", ""),
    ("memory", "Multiplier::publish();", ""),
    ("memory", "((vector ^ row % 8) << 4)", "((vector ^ row % 4) << 4)"),
    ("threads", "wait_for(shared.full + place.stage, place.parity);", ""),
]

STEP_FAULTS = [  # too many plans at once, and groups that are cut in another way than the first
    ("plans = std::max(plans, ", "plans = std::min(plans, "),
    ("steps[group].push_back(", "if (group == 0 || round == 0) steps[group].push_back("),
]


def with_fault(files: str, right: str, wrong: str, folder: Path) -> Path:
    """A copy of the sources in which one thing is done wrong; `files` is a pattern."""
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
    """Why programs cannot be made or run with a sanitizer here; None where they can."""
    if shutil.which("g++") is None:
        return "no g++"
    source, program = folder / "nothing.cpp", folder / f"nothing_{sanitizer}"
    source.write_text("int main() { return 0; }")
    built = compile_program(source, program, SANITIZERS[sanitizer])
    if built.returncode != 0:
        return f"g++ has no such sanitizer: {built.stderr}"
    result = run_program(program)
    return None if result.returncode == 0 else f"it does not run here: {result.stderr}"


def build(
    name: str,
    sanitizer: str,
    flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    sources: Path = SOURCES,
) -> Path:
    """A program with a sanitizer, in a folder of its own; skips the test where there is none."""
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
def test_equals_plain_loops_and_stays_inside_memory(
    program: str, sanitizer: str, flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With NaN, infinite and far offsets, bad boxes, and buffers of exactly their size."""
    arguments = CONV_CHECK if program == "conv_check" else []
    result = run_program(build(program, sanitizer, flags, tmp_path_factory), *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("right", "wrong"), STEP_FAULTS)
def test_a_fault_of_the_steps_is_seen(
    right: str, wrong: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sources = with_fault("cpu/conv/depth_steps.h", right, wrong, tmp_path)
    result = run_program(build("steps_check", "memory", [], tmp_path_factory, sources))
    assert result.returncode != 0


@pytest.mark.parametrize("kernel", ["one_block", "two_blocks", "shared_memory"])
def test_a_race_is_seen(kernel: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    right = run_program(build("race_check", "threads", [], tmp_path_factory), kernel)
    assert right.returncode == 0, right.stderr
    racy = run_program(build("race_check", "threads", ["-DRACY"], tmp_path_factory), kernel)
    assert "data race" in racy.stderr
    assert racy.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "right", "wrong"), FUSED_FAULTS)
def test_a_fault_of_the_fused_forward_is_seen(
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


def test_more_than_2_to_the_31_numbers(tmp_path_factory: pytest.TempPathFactory) -> None:
    result = run_program(build("index_check", "memory", [], tmp_path_factory))
    if result.returncode == NO_SUCH_MEMORY:
        pytest.skip("this machine does not reserve memory that it does not have")
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
def test_an_index_of_32_bits_is_seen(
    file: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sources = tmp_path / "cuda_ops"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert "int64_t" in text
    (sources / file).write_text(text.replace("int64_t", "int32_t"))
    program = build("index_check", "memory", ["-Wno-narrowing"], tmp_path_factory, sources)
    result = run_program(program)
    if result.returncode == NO_SUCH_MEMORY:
        pytest.skip("this machine does not reserve memory that it does not have")
    assert result.returncode != 0
