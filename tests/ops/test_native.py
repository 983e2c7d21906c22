from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcnseg.ops import _native, native_status

CONVOLVE = """
import json, torch, warnings
from dcnseg.errors import NativeOpsError
from dcnseg.ops import deform_conv2d
arguments = torch.ones(1, 1, 4, 4), torch.zeros(1, 18, 4, 4), torch.ones(1, 1, 3, 3), None, 1, 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sums = [deform_conv2d(*arguments).sum().item() for _ in range(2)]
try:
    deform_conv2d(*arguments, backend="native")
except NativeOpsError as error:
    print(json.dumps([sums, [str(warning.message) for warning in caught], str(error)]))
"""


def test_status_has_three_keys_and_is_a_copy() -> None:
    assert set(native_status()) == {"build", "cpu", "cuda"}
    native_status()["cpu"] = "changed"
    assert native_status()["cpu"] != "changed"


def test_disabled_operators_warn_once_and_native_raises() -> None:
    output = subprocess.run(
        [sys.executable, "-c", CONVOLVE],
        env=os.environ | {"DCNSEG_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    sums, warnings, error = json.loads(output)
    assert sums == [100.0, 100.0]  # 16 positions of 9 taps, minus those outside the map
    assert warnings == [
        "dcnseg uses the slower PyTorch implementation for cpu tensors: native operators are "
        "disabled by DCNSEG_NATIVE=0."
    ]
    assert error == (
        "The native deform_conv2d is not available for cpu tensors: native operators are disabled "
        'by DCNSEG_NATIVE=0. Pass backend="auto" to use the PyTorch implementation.'
    )


def test_invalid_and_missing_libraries_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCNSEG_NATIVE", "1")
    monkeypatch.setenv("DCNSEG_NATIVE_DIR", str(tmp_path))
    missing = _native._load_all()["cpu"]
    assert missing.startswith("not built") or "shadows the installed package" in missing
    (tmp_path / "libdcnseg_cpu.so").write_text("not a library")
    assert _native._load_all()["cpu"].startswith("failed to load: ")


def test_shadowed_installation_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with libraries, and Python started in a folder with the sources."""
    (tmp_path / "dcnseg" / "_native").mkdir(parents=True)
    installed = SimpleNamespace(locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(metadata, "distribution", lambda _name: installed)
    assert _native._missing_file_reason("libdcnseg_cpu.so") == "not built"
    (tmp_path / "dcnseg" / "_native" / "libdcnseg_cpu.so").touch()
    reason = _native._missing_file_reason("libdcnseg_cpu.so")
    source = Path(_native.__file__).parents[1]
    assert f"the source folder {source} shadows the installed package {tmp_path}" in reason
