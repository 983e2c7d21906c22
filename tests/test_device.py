from __future__ import annotations

import pytest
import torch

from dcnseg import device
from dcnseg.device import select_amp_dtype, select_device
from dcnseg.errors import ConfigError

CPU = torch.device("cpu")


def test_unavailable_or_unknown_device_is_an_error() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=f"--device is {missing}, but PyTorch finds"):
        select_device(missing)
    with pytest.raises(ConfigError, match="--device is 'cuda:x'"):
        select_device("cuda:x")
    with pytest.raises(ConfigError, match=r"'meta'; expected one of auto, .*, or cuda:N"):
        select_device("meta")


@pytest.mark.parametrize(
    ("name", "is_fast", "capability", "dtype"),
    [
        ("cpu", True, None, torch.bfloat16),
        ("cpu", False, None, None),
        ("cuda", False, (7, 5), torch.float16),
        ("cuda", False, (8, 0), torch.bfloat16),
    ],
)
def test_auto_amp(
    monkeypatch: pytest.MonkeyPatch, name: str, is_fast: bool, capability: object, dtype: object
) -> None:
    monkeypatch.setattr(device, "has_cpu_bfloat16", lambda: is_fast)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert select_amp_dtype("auto", torch.device(name)) is dtype


def test_amp_modes() -> None:
    assert select_amp_dtype("off", CPU) is None
    assert select_amp_dtype("bf16", CPU) is torch.bfloat16
    with pytest.raises(ConfigError, match="--amp fp16 requires a GPU"):
        select_amp_dtype("fp16", CPU)
    with pytest.raises(ConfigError, match="--amp is 'half'; expected one of auto, off"):
        select_amp_dtype("half", CPU)
