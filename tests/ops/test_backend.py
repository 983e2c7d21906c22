from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from dcnseg.errors import NativeOpsError
from dcnseg.ops import backend


def test_gpu_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, calls = torch.device("cuda", 0), []
    tensor = cast(Tensor, SimpleNamespace(device=gpu))

    def self_test(device: torch.device) -> str:
        calls.append(device)
        return "failed its self-test"

    def use_native(name: str) -> bool:
        return backend.use_native("op", name, (tensor,), self_test)

    monkeypatch.setattr(backend, "missing_reason", lambda _device_type: None)
    monkeypatch.setattr(backend, "_tested_gpus", {})
    monkeypatch.setattr(backend, "_warned_devices", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(
        RuntimeWarning, match="PyTorch implementation for cuda tensors: failed its self-test"
    ):
        assert not use_native("auto")
    assert not use_native("auto")  # and no second warning, which would be an error
    with pytest.raises(NativeOpsError, match="for cuda tensors: failed its self-test"):
        use_native("native")
    assert calls == [gpu]
    monkeypatch.setattr(backend, "_tested_gpus", {("op", gpu): None})
    assert use_native("auto")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(NativeOpsError, match="not deterministic"):
            use_native("native")
    finally:
        torch.use_deterministic_algorithms(False)
