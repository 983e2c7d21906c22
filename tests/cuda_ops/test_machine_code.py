"""Checks of the PTX of nvcc, which the host emulation cannot cover."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "cuda_ops"


def kernels(ptx: str) -> list[str]:
    """The code of each kernel."""
    return ptx.split(".entry ")[1:]


@pytest.fixture(scope="module")
def fused_ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The kernels of the fused forward, by target."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("ptx")
    code = {}
    for target in ("80", "90a"):
        ptx = folder / f"{target}.ptx"
        architecture = f"arch=compute_{target},code=compute_{target}"
        subprocess.run(
            [nvcc, "-std=c++17", "-ptx", f"-gencode={architecture}", f"-I{SOURCES}",
             f"-I{SOURCES / 'include'}", str(SOURCES / "cuda" / "conv" / "fused_forward.cu"),
             "-o", str(ptx)],
            check=True,
        )  # fmt: skip
        code[target] = kernels(ptx.read_text())
    return code


def test_wgmma_is_preceded_by_a_proxy_fence(fused_ptx: dict[str, list[str]]) -> None:
    """Nvcc 13.0 drops the statement after an untaken `if constexpr` that begins with a pragma."""
    with_wgmma = [code for code in fused_ptx["90a"] if "wgmma.mma_async" in code]
    assert len(with_wgmma) == 9  # three types, three widths
    assert all(code.count("fence.proxy.async") == 1 for code in with_wgmma)
    assert all("setmaxnreg.inc" in code for code in with_wgmma if "Li256E" in code[:200])


def test_other_targets_use_mma(fused_ptx: dict[str, list[str]]) -> None:
    with_mma = [code for code in fused_ptx["80"] if "mma.sync" in code]
    assert len(with_mma) == 6  # three types, two widths
    assert not any("wgmma" in code.split("{", 1)[1] for code in fused_ptx["80"])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    "name", ["ops_cuda", "conv/deform_conv2d", "conv/deform_conv2d_backward", "roi/ops_roi"]
)
def test_compiles(name: str, tmp_path: Path) -> None:
    """The other sources of the CUDA library; the fused forward is compiled above."""
    subprocess.run(
        ["nvcc", "-std=c++17", "-ptx", "-arch=compute_80", f"-I{SOURCES}",
         f"-I{SOURCES / 'include'}", str(SOURCES / "cuda" / f"{name}.cu"),
         "-o", str(tmp_path / "code.ptx")],
        check=True,
    )  # fmt: skip
