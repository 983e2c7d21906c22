from __future__ import annotations

import sys
from types import ModuleType

import pytest

from dcnseg.errors import ConfigError
from dcnseg.inference.optional_packages import import_package


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("openvino")
    monkeypatch.setitem(sys.modules, "openvino", module)
    assert import_package("openvino") is module
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    text = (
        r'the package onnxruntime is not installed\. Install it with: pip install "dcnseg\[onnx\]"'
    )
    with pytest.raises(ConfigError, match=text):
        import_package("onnxruntime")
