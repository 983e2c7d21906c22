from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcnseg.ops import native_status

CONVOLVE = """
import sys, torch, warnings
from dcnseg.errors import NativeOpsError
from dcnseg.ops import deform_conv2d, native_status
arguments = torch.ones(1, 1, 4, 4), torch.zeros(1, 18, 4, 4), torch.ones(1, 1, 3, 3), None, 1, 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sums = [deform_conv2d(*arguments).sum().item() for _ in range(2)]
try:
    deform_conv2d(*arguments, backend="native")
    error = None
except NativeOpsError as raised:
    error = str(raised)
import json
print(json.dumps({"status": native_status(), "sums": sums, "error": error,
                  "warnings": [str(warning.message) for warning in caught]}))
"""


def run(cwd: Path | None = None, **environment: str) -> dict[str, object]:
    """What a fresh process says about its operators."""
    result = subprocess.run(
        [sys.executable, "-c", CONVOLVE],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    result_json: dict[str, object] = json.loads(result.stdout)
    return result_json


def test_status_has_the_three_keys() -> None:
    assert set(native_status()) == {"build", "cpu", "cuda"}
    native_status()["cpu"] = "spoilt"
    assert native_status()["cpu"] != "spoilt"


def test_disabled_operators_warn_once_and_native_raises() -> None:
    result_json = run(DCNSEG_NATIVE="0")
    assert result_json["sums"] == [100.0, 100.0]  # 16 positions of 9 taps, less what lies outside
    assert result_json["warnings"] == [
        "dcnseg uses the slower PyTorch implementation for cpu tensors: native operators are "
        "disabled by DCNSEG_NATIVE=0."
    ]
    assert result_json["error"] == (
        "The native deform_conv2d is not available for cpu tensors: native operators are disabled "
        'by DCNSEG_NATIVE=0. Pass backend="auto" to use the PyTorch implementation.'
    )


def test_file_that_is_no_library_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "libdcnseg_cpu.so").write_text("not a library")
    result_json = run(DCNSEG_NATIVE_DIR=str(tmp_path))
    assert isinstance(result_json["error"], str)
    assert "failed to load" in result_json["error"]


def test_missing_library_is_a_reason(tmp_path: Path) -> None:
    """With the package installed elsewhere with its libraries, the reason is the shadowing."""
    result_json = run(DCNSEG_NATIVE_DIR=str(tmp_path))
    assert isinstance(result_json["error"], str)
    assert (
        "not built" in result_json["error"]
        or "shadows the installed package" in result_json["error"]
    )


@pytest.mark.skipif(native_status()["cpu"] != "loaded", reason=native_status()["cpu"])
def test_source_folder_that_shadows_the_installed_package_is_named(tmp_path: Path) -> None:
    """A plain installation, and Python started in a folder that holds the sources."""
    source = Path(__file__).parents[2] / "dcnseg"
    installed, checkout = tmp_path / "site", tmp_path / "checkout"
    (installed / "dcnseg" / "_native").mkdir(parents=True)
    (installed / "dcnseg" / "_native" / "libdcnseg_cpu.so").touch()
    info = installed / "dcnseg-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dcnseg\nVersion: 0.1\n")
    checkout.mkdir()
    (checkout / "dcnseg").symlink_to(source)
    code = f"import sys; sys.path[:0] = [{str(checkout)!r}, {str(installed)!r}]\n"
    code += "sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
    code += "from dcnseg.ops import native_status; print(native_status()['cpu'])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert f"the source folder {checkout / 'dcnseg'} shadows the installed package" in result.stdout
