from __future__ import annotations

import pytest
import torch

from dcnseg import device
from dcnseg.device import select_amp_dtype, select_device
from dcnseg.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_device_works() -> None:
    assert torch.ones(1, device=select_device("auto")).item() == 1


def test_unavailable_or_unknown_device_is_an_error() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=f"--device is {missing}, but PyTorch finds"):
        select_device(missing)
    with pytest.raises(ConfigError, match="--device is 'cuda:x'"):
        select_device("cuda:x")
    with pytest.raises(ConfigError, match=r"'meta'; expected one of auto, .*, or cuda:N"):
        select_device("meta")


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, torch.bfloat16), (False, None)])
def test_auto_amp_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, is_fast: bool, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(device, "has_cpu_bfloat16", lambda: is_fast)
    assert select_amp_dtype("auto", CPU) is dtype


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_amp_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert select_amp_dtype("auto", torch.device("cuda")) is dtype


def test_amp_modes() -> None:
    assert select_amp_dtype("off", CPU) is None
    assert select_amp_dtype("bf16", CPU) is torch.bfloat16
    with pytest.raises(ConfigError, match="--amp fp16 requires a GPU"):
        select_amp_dtype("fp16", CPU)
    with pytest.raises(ConfigError, match="--amp is 'half'; expected one of auto, off"):
        select_amp_dtype("half", CPU)
