"""The wheel works without a compiler and without the checkout, in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from dcnseg import __version__

ROOT = Path(__file__).parents[1]
SOURCES = ("dcnseg", "cli/dcnseg_cli", "cuda_ops", "pyproject.toml", "README.md")

CONVOLVE = """
import torch
from dcnseg.ops import deform_conv2d
torch.manual_seed(0)
arguments = torch.randn(1, 4, 9, 9), torch.randn(1, 18, 9, 9), torch.randn(5, 4, 3, 3)
native, reference = (
    deform_conv2d(*arguments, padding=1, backend=backend) for backend in ("native", "reference")
)
torch.testing.assert_close(native, reference)
"""

pytestmark = pytest.mark.slow


def last_change(path: Path) -> float:
    files = (file for file in (path, *path.rglob("*")) if file.is_file())
    return max(file.stat().st_mtime for file in files if "__pycache__" not in file.parts)


def find_built_wheel() -> Path | None:
    """The wheel that `make wheel` wrote, unless a source file has changed since."""
    changed = max(last_change(ROOT / source) for source in SOURCES)
    wheels = (ROOT / "dist").glob(f"dcnseg-{__version__}-py3-none-*linux*.whl")
    return next((wheel for wheel in wheels if wheel.stat().st_mtime > changed), None)


def build_wheel(folder: Path) -> Path:
    """A wheel with the operators for the CPU only: nvcc would take minutes."""
    if missing := [tool for tool in ("g++", "cmake") if shutil.which(tool) is None]:
        pytest.skip(f"building a wheel needs {missing[0]}, which is not installed")
    run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
         "-Ccmake.define.DCNSEG_CUDA=OFF", f"-Cbuild-dir={folder / 'build'}",
         "--wheel-dir", str(folder), str(ROOT)],
        folder, dict(os.environ, DCNSEG_REQUIRE_NATIVE="1"),
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def run(command: list[str], cwd: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return find_built_wheel() or build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a virtual environment with the wheel.

    A .pth file lends it the packages of the running environment. An editable dcnseg is not among
    them, because it is itself made available by a .pth file, which Python does not follow here.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    run(
        [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-index", "--no-deps",
         str(wheel)],
        folder, dict(os.environ),
    )  # fmt: skip
    site_packages = next(folder.glob("lib/python*/site-packages"))
    lent = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site_packages / "lent.pth").write_text("\n".join(lent))
    return folder / "bin"


@pytest.fixture
def environment(bin_folder: Path) -> dict[str, str]:
    """Variables without a compiler on PATH and without the settings of Python and dcnseg."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DCNSEG_", "PYTHON", "VIRTUAL_ENV"))
    }
    return kept | {"PATH": str(bin_folder)}


def test_file_name_and_content(wheel: Path) -> None:
    assert wheel.name.startswith(f"dcnseg-{__version__}-py3-none-")
    names = ZipFile(wheel).namelist()
    assert "dcnseg/_native/libdcnseg_cpu.so" in names
    assets = {"base.html", "explorer.html", "explorer.css", "main.js"}
    assert assets <= {name.split("/")[-1] for name in names}
    assert {name.split("/")[0] for name in names} == {
        "dcnseg",
        "dcnseg_cli",
        f"dcnseg-{__version__}.dist-info",
    }
    assert not any("torch" in name.split("/")[-1] for name in names if ".so" in name)


def test_native_operators_load(
    bin_folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    output = run([str(bin_folder / "dcnseg"), "info", "--json"], tmp_path, environment)
    info = json.loads(output)
    assert info["dcnseg"] == __version__
    assert info["native_operators"]["cpu"] == "loaded"
    code = CONVOLVE + "import dcnseg; print(dcnseg.__file__)"
    imported = run([str(bin_folder / "python"), "-c", code], tmp_path, environment)
    assert bin_folder.parent in Path(imported.strip()).parents


def test_training_and_prediction(
    bin_folder: Path, environment: dict[str, str], scenes: Path, tmp_path: Path
) -> None:
    program = str(bin_folder / "dcnseg")
    run(
        [program, "train", str(scenes), "--out=run", "--encoder=resnet18", "--encoder-weights=none",
         "--decoder-channels=16", "--crop-size=64", "--batch-size=4", "--epochs=1", "--workers=0",
         "--device=cpu"],
        tmp_path, environment,
    )  # fmt: skip
    run(
        [program, "predict", "run", str(scenes / "val" / "images"), "--out=predictions",
         "--device=cpu"],
        tmp_path, environment,
    )  # fmt: skip
    assert any((tmp_path / "predictions").rglob("*.png"))
