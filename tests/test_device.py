from __future__ import annotations

import pytest
import torch

from dcnseg.device import select_amp_dtype, select_device
from dcnseg.errors import ConfigError

CPU = torch.device("cpu")


def test_auto_gives_a_device_that_works() -> None:
    assert torch.ones(1, device=select_device("auto")).item() == 1


def test_missing_device_is_named() -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=f"--device is {missing}, but torch sees"):
        select_device(missing)


def test_nonsense_is_named() -> None:
    with pytest.raises(ConfigError, match="--device is 'cuda:x'"):
        select_device("cuda:x")
    with pytest.raises(ConfigError, match="--device is 'meta'; expected one of auto, cpu"):
        select_device("meta")


def test_amp_modes() -> None:
    assert select_amp_dtype("off", CPU) is None
    assert select_amp_dtype("bf16", CPU) is torch.bfloat16
    assert select_amp_dtype("auto", CPU) in (None, torch.bfloat16)
    with pytest.raises(ConfigError, match="--amp fp16 needs a GPU"):
        select_amp_dtype("fp16", CPU)
    with pytest.raises(ConfigError, match="--amp is 'half'; expected one of auto, off"):
        select_amp_dtype("half", CPU)
