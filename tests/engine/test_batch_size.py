from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcnseg.config import DataConfig, TrainConfig
from dcnseg.device import free_memory
from dcnseg.engine import batch_size
from dcnseg.engine.batch_size import (
    _estimate_largest,
    _find_largest,
    explain_training_out_of_memory,
    find_batch_size,
)
from dcnseg.errors import TrainingError
from tests.conftest import small_config
from tests.engine.runs import CPU


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate"),
    ],
)
def test_out_of_memory_is_explained(error: Exception) -> None:
    config = TrainConfig(DataConfig(Path(), crop_size=(64, 96)))
    text = (
        r"Out of memory on cpu for a batch of 8 crops of 64x96.*--batch-size 4 --accumulate 2, "
        r"--crop-size 32,48, --amp bf16, or --batch-size auto"
    )
    with pytest.raises(TrainingError, match=text), explain_training_out_of_memory(config, CPU):
        raise error
    with pytest.raises(RuntimeError, match="another"), explain_training_out_of_memory(config, CPU):
        raise RuntimeError("another")


@pytest.mark.parametrize(("limit", "size"), [(1, None), (2, 2), (5, 3), (12, 8), (1000, 64)])
def test_the_largest_batch_is_found_by_trying(limit: int, size: int | None) -> None:
    def try_batch(images: int) -> None:
        if images > limit:
            raise torch.OutOfMemoryError

    if size is None:
        with pytest.raises(torch.OutOfMemoryError):
            _find_largest(try_batch)
    else:
        assert _find_largest(try_batch) == size


def test_the_largest_batch_is_estimated_on_a_cpu() -> None:
    weight = torch.zeros(1000, requires_grad=True)

    def try_batch(images: int) -> None:
        (weight * torch.ones(images, 1000)).square().sum().backward()

    # Saved for the backward pass, per image: 1000 ones and 1000 products of 4 bytes.
    per_image = batch_size.WORKING_FACTOR * 8000 / batch_size.USED_SHARE
    sizes = [_estimate_largest(try_batch, [weight], free) for free in (0, 5.5 * per_image, 1e18)]
    assert sizes == [2, 5, 16]
    assert free_memory() > 1e6


def test_the_number_of_images_limits_the_batch_size(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "free_memory", lambda: 1e18)
    assert find_batch_size(small_config(scenes), num_classes=3, num_images=5) == 5


def test_a_region_head_needs_more_memory(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its regions are part of the tried batches."""
    monkeypatch.setattr(batch_size, "free_memory", lambda: 3e8)
    config = small_config(scenes)
    model = replace(config.model, region_head="deformable-fc", region_bins=14)
    sizes = [
        find_batch_size(each, num_classes=3, num_images=99)
        for each in (config, replace(config, model=model))
    ]
    assert sizes[0] > sizes[1] >= 2
