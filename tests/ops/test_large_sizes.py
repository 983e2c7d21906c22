"""Both implementations reject sizes that do not fit in memory, before they allocate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.errors import ShapeError
from dcnseg.ops import (
    DeformConv2d,
    DeformPSRoIPool,
    DeformRoIPool,
    PSRoIPool,
    RoIAvgPool,
    RoIPool,
    checks,
    deform_conv2d,
    deform_ps_roi_pool,
    deform_roi_pool,
    ps_roi_pool,
    roi_avg_pool,
    roi_pool,
)
from dcnseg.ops.backend import Backend
from tests.ops.common import NEEDS_NATIVE

INPUT = torch.arange(2.0 * 12 * 6 * 7).view(2, 12, 6, 7)
POOLS: dict[str, Callable[..., Tensor]] = {
    "roi_pool": roi_pool,
    "roi_avg_pool": roi_avg_pool,
    "ps_roi_pool": ps_roi_pool,
    "deform_roi_pool": partial(deform_roi_pool, offset=None),
    "deform_ps_roi_pool": partial(deform_ps_roi_pool, offset=None, group_size=1),
}
MODULES: dict[str, Callable[..., object]] = {
    "RoIPool": RoIPool,
    "RoIAvgPool": RoIAvgPool,
    "PSRoIPool": PSRoIPool,
    "DeformRoIPool": partial(DeformRoIPool, spatial_scale=1.0, in_channels=4),
    "DeformPSRoIPool": partial(DeformPSRoIPool, spatial_scale=1.0, in_channels=4),
}
BACKENDS: tuple[Backend, ...] = ("native", "reference")

few = settings(max_examples=25)
TOO_LARGE = st.integers(2**31, 2**70)
LARGE_PAIRS = st.one_of(
    TOO_LARGE,
    st.integers(46341, 2**31 - 1),  # square above 2^31
    st.tuples(TOO_LARGE, st.integers(1, 9)),
    st.tuples(st.integers(1, 9), TOO_LARGE),
    st.tuples(st.integers(2**20, 2**31 - 1), st.integers(2**20, 2**31 - 1)),
)


def boxes_of(count: int) -> Tensor:
    return torch.tensor([[1.0, 1, 0, 5, 4]]).expand(count, 5)


def outcome(call: Callable[..., Tensor], backend: Backend) -> Tensor | str:
    """Return the output of a call or the message of its ShapeError."""
    try:
        return call(backend=backend)
    except ShapeError as error:
        return str(error)


@NEEDS_NATIVE
@few
@pytest.mark.parametrize("name", POOLS)
@given(size=LARGE_PAIRS, boxes=st.sampled_from([0, 1, 2**40]))
@example(size=10**9, boxes=1)
@example(size=(10**9, 1), boxes=2**20)
def test_too_many_bins_are_rejected(name: str, size: int | tuple[int, int], boxes: int) -> None:
    pool = partial(POOLS[name], INPUT, boxes_of(boxes), output_size=size)
    native, reference = (outcome(pool, backend) for backend in BACKENDS)
    assert isinstance(native, str)
    assert native == reference
    assert re.search(r"at most 2147483647|Pooling .* GB|groups of `output_size`, because", native)


@few
@pytest.mark.parametrize("name", MODULES)
@given(size=LARGE_PAIRS)
def test_module_rejects_too_many_bins(name: str, size: int | tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=r"`output_size` is .*expected .*at most 2147483647"):
        MODULES[name](output_size=size)


@pytest.mark.parametrize("changes", [{"group_size": 2**40}, {"part_size": (2**16, 2**16)}])
def test_too_many_groups_and_parts_are_rejected(changes: dict[str, Any]) -> None:
    name = next(iter(changes))
    message = f"`{name}` is .*expected .*at most 2147483647"
    with pytest.raises(ShapeError, match=message):
        DeformPSRoIPool(2, 1.0, 4, **changes)
    for channels in (0, 12):
        with pytest.raises(ShapeError, match=message):
            deform_ps_roi_pool(INPUT[:, :channels], boxes_of(1), None, 1, **changes)


@pytest.mark.parametrize(
    "make",
    [
        partial(DeformRoIPool, 40000, 1.0, 256),
        partial(DeformRoIPool, 7, 1.0, 256, hidden_channels=2**30),
        partial(DeformPSRoIPool, 7, 1.0, 2**24, classes=2**12),
        partial(DeformPSRoIPool, 7, 1.0, 2**10, kernel_size=2**20 + 1),
    ],
)
def test_parameters_larger_than_memory_are_rejected(make: Callable[[], object]) -> None:
    message = (
        r"The parameters of `offset_branch` would need .* GB, but cpu has only .* GB of memory\."
    )
    with pytest.raises(ShapeError, match=message):
        make()


def test_expanded_offset_larger_than_memory_is_rejected() -> None:
    offset = torch.zeros(1, 2, 1, 1).expand(2**20, 2, 2**15, 2**15)
    with pytest.raises(
        ShapeError, match=r"A copy of `offset` of shape \[1048576, 2, 32768, 32768\] in"
    ):
        deform_ps_roi_pool(INPUT, boxes_of(2**20), offset, 1, part_size=2**15)


@NEEDS_NATIVE
@few
@pytest.mark.parametrize("name", POOLS)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    boxes=st.integers(0, 9),
    memory=st.integers(1, 20_000),
)
def test_output_must_fit_in_memory(
    name: str, size: tuple[int, int], boxes: int, memory: int
) -> None:
    """Sizes that fit are pooled; others are rejected before the allocation."""
    channels = 12 if name != "ps_roi_pool" else size[0] * size[1]
    input = INPUT[:, :1].expand(2, channels, 6, 7)
    pool = partial(POOLS[name], input, boxes_of(boxes), output_size=size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "_total_memory", lambda device: memory)
        limited = outcome(pool, "native")
        assert isinstance(limited, Tensor) or limited == outcome(pool, "reference")
    output = pool(backend="native")
    if isinstance(limited, str):
        assert output.nbytes + 32 * (boxes + 1) * sum(size) > memory
    else:
        assert output.nbytes <= memory
        torch.testing.assert_close(limited, output, equal_nan=True)


def test_samples_of_the_reference_must_fit_in_memory() -> None:
    """The native implementation does not store samples."""
    message = r"The PyTorch implementation with 4294967296 samples per bin would need .* GB"
    with pytest.raises(ShapeError, match=message):
        deform_roi_pool(
            INPUT, boxes_of(1), None, 1, mode="mmcv", sampling_ratio=2**16, backend="reference"
        )


# Most of these values leave one or two output positions along an axis.
STEPS = st.sampled_from([1, 2, 2**24 + 1, 2**31 - 5, 2**31 - 1, 2**31, 2**40, 2**64, 2**70])
STEP_PAIRS = st.tuples(STEPS, STEPS)


def output_size(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


@NEEDS_NATIVE
@given(
    kernel=st.sampled_from([(1, 1), (1, 2), (3, 1), (2, 2)]),
    stride=STEP_PAIRS,
    padding=st.tuples(st.one_of(st.just(0), STEPS), st.one_of(st.just(0), STEPS)),
    dilation=STEP_PAIRS,
)
@example(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(2**40, 1))
@example(kernel=(1, 3), stride=(1, 1), padding=(0, 1), dilation=(2**40, 1))
@example(kernel=(1, 1), stride=(1, 2**24 + 1), padding=(0, 2**24), dilation=(2**31 - 1, 1))
def test_window_has_the_same_outcome_in_both_implementations(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    out = [
        output_size(*axis)
        for axis in zip(INPUT.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    out = [min(max(n, 1), 2**24) for n in out]
    assume(not 1000 < math.prod(out) < 2**40)  # too slow, but not too large
    offset = torch.full((1, 1, 1, 1), 0.25).expand(2, 2 * kernel[0] * kernel[1], *out)
    weight = torch.arange(1.0, 1 + 24 * kernel[0] * kernel[1]).view(2, 12, *kernel)
    call = partial(deform_conv2d, INPUT, offset, weight, None, stride, padding, dilation)
    native, reference = (outcome(call, backend) for backend in BACKENDS)
    assert type(native) is type(reference)
    if isinstance(native, str):
        assert native == reference
    else:
        torch.testing.assert_close(native, reference)
    assert isinstance(native, str) or max(*stride, *padding, *dilation) < 2**31


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_module_rejects_steps_above_int32(name: str) -> None:
    message = rf"`{name}` is \(1099511627776, 1099511627776\); expected .*at most 2147483647\."
    with pytest.raises(ShapeError, match=message):
        DeformConv2d(4, 4, 1, **{name: 2**40})  # type: ignore[arg-type]


@NEEDS_NATIVE
@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_maps_and_outputs_larger_than_memory_are_rejected(backend: Backend) -> None:
    pixel, weight = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    with pytest.raises(ShapeError, match=r"`input` is 65536x65536 .* less than 2147483647"):
        deform_conv2d(
            pixel.expand(1, 1, 2**16, 2**16), pixel.expand(1, 2, 1, 1), weight, None, 2**17,
            backend=backend,
        )  # fmt: skip
    side = 2**21 + 1
    with pytest.raises(
        ShapeError, match=r"An output of shape \[1, 1, 2097153, 2097153\] would need"
    ):
        deform_conv2d(
            pixel, pixel.expand(1, 2, side, side), weight, None, 1, 2**20, backend=backend
        )
