from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from dcnseg.errors import ShapeError
from dcnseg.ops import deform_conv2d
from dcnseg.ops.deform_conv.checks import Window, check_arguments
from dcnseg.ops.deform_conv.native import deform_conv2d_native
from tests.ops.marks import NEEDS_NATIVE

GOOD: dict[str, Any] = {
    "input": torch.zeros(2, 4, 6, 7),
    "offset": torch.zeros(2, 36, 6, 7),
    "weight": torch.zeros(6, 2, 3, 3),
    "bias": torch.zeros(6),
    "mask": torch.zeros(2, 18, 6, 7),
    "padding": 1,
}


def test_good_arguments_pass() -> None:
    assert deform_conv2d(**GOOD).shape == (2, 6, 6, 7)
    assert deform_conv2d(**GOOD | {"padding": [1, np.int64(1)]}).shape == (2, 6, 6, 7)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": torch.zeros(4, 6, 7)}, "`input` has 3 dimensions, [4, 6, 7]; expected 4."),
    ({"bias": torch.zeros(6, 1)}, "`bias` has 2 dimensions, [6, 1]; expected 1."),
    (
        {"offset": torch.zeros(2, 36, 6, 7, device="meta")},
        "`offset` is on meta and `input` on cpu; move them to one device.",
    ),
    (
        {"mask": torch.zeros(2, 18, 6, 7, dtype=torch.int64)},
        "`mask` is torch.int64; expected a floating-point tensor.",
    ),
    (
        {"weight": torch.zeros(6, 2, 3, 3, dtype=torch.float64)},
        "`weight` is torch.float64 and `input` torch.float32; give both one dtype, or use "
        "autocast.",
    ),
    (
        {"weight": torch.zeros(6, 3, 3, 3)},
        "`weight` is [6, 3, 3, 3] and `input` has 4 channels; expected [C_out, C/groups, kh, "
        "kw] with no size 0 and 4 divisible by weight's second size.",
    ),
    ({"weight": torch.zeros(6, 2, 0, 3)}, "`weight` is [6, 2, 0, 3] and `input` has 4"),
    (
        {"weight": torch.zeros(5, 2, 3, 3)},
        "`weight` has 5 output channels, which 2 groups (input's 4 channels by weight's 2) do "
        "not divide.",
    ),
    (
        {"offset": torch.zeros(2, 20, 6, 7)},
        "`offset` has 20 channels; a 3x3 kernel needs 2*9 = 18 for each offset group.",
    ),
    ({"offset": torch.zeros(2, 0, 6, 7)}, "`offset` has 0 channels; a 3x3 kernel needs 2*9"),
    (
        {"offset": torch.zeros(2, 27, 6, 7)},
        "`offset` has 27 channels; a 3x3 kernel needs 2*9 = 18 for each offset group. With "
        "offset_groups=1 that is 2*1*9 = 18: pass the modulation as `mask`, not concatenated.",
    ),
    (
        {"offset": torch.zeros(2, 54, 6, 7)},
        "`offset` has 54 channels, that is 3 offset groups of a 3x3 kernel; they do not divide "
        "input's 4 channels.",
    ),
    (
        {"mask": torch.zeros(2, 9, 6, 7)},
        "`mask` has 9 channels; a 3x3 kernel with offset_groups=2 needs 2*9 = 18.",
    ),
    (
        {"padding": 0, "dilation": 3},
        "`input` is 6x7 (height x width), too small for a 3x3 kernel with dilation (3, 3) and "
        "padding (0, 0).",
    ),
    ({"input": torch.zeros(2, 4, 0, 7)}, "`input` is 0x7 (height x width), too small"),
    (
        {"offset": torch.zeros(2, 36, 6, 8)},
        "`offset` is [2, 36, 6, 8]; input [2, 4, 6, 7] with a 3x3 kernel, stride (1, 1), "
        "padding (1, 1) and dilation (1, 1) needs [2, 36, 6, 7].",
    ),
    (
        {"mask": torch.zeros(1, 18, 6, 7)},
        "`mask` is [1, 18, 6, 7]; input [2, 4, 6, 7] with a 3x3 kernel, stride (1, 1), "
        "padding (1, 1) and dilation (1, 1) needs [2, 18, 6, 7].",
    ),
    ({"bias": torch.zeros(4)}, "`bias` has 4 elements; `weight` has 6 output channels."),
    ({"stride": True}, "`stride` is True; expected one or two integers of at least 1."),
    ({"padding": "same"}, "`padding` is 'same'; expected one or two integers of at least 0."),
    ({"stride": 0}, "`stride` is 0; expected one or two integers of at least 1."),
    ({"padding": (1, -1)}, "`padding` is (1, -1); expected one or two integers of at least 0."),
    ({"dilation": (1, 2, 3)}, "`dilation` is (1, 2, 3); expected one or two integers of at"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_message_names_argument_expectation_and_fact(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)):
        deform_conv2d(**GOOD | changes)


@pytest.mark.parametrize(("changes", "message"), [bad for bad in BAD if "device" not in bad[1]])
def test_message_is_the_same_where_nothing_is_computed(
    changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in (GOOD | changes).items()
    }
    with pytest.raises(ShapeError, match=re.escape(message)):
        deform_conv2d(**arguments)


def with_size(name: str, dim: int, by: int) -> dict[str, Any]:
    """One of the good tensors with another size."""
    sizes = list(GOOD[name].shape)
    sizes[dim % len(sizes)] = max(0, sizes[dim % len(sizes)] + by)
    return {name: torch.zeros(sizes)}


TENSORS = st.sampled_from(["input", "offset", "weight", "bias", "mask"])
DTYPES = st.sampled_from([torch.float64, torch.bfloat16, torch.int64, torch.complex64])
CHANGES = st.one_of(
    st.builds(with_size, TENSORS, st.integers(0, 3), st.sampled_from([-18, -2, -1, 1, 2, 9, 18])),
    st.builds(lambda name, dtype: {name: GOOD[name].to(dtype)}, TENSORS, DTYPES),
    st.builds(lambda name: {name: GOOD[name][0]}, TENSORS),
    st.builds(lambda name: {name: None}, st.sampled_from(["bias", "mask"])),
)
FITTING = st.integers(1, 5).map(lambda n: Window((1, 1), (n, n), (n, n)))
ANY_PAIR = st.tuples(st.integers(1, 4), st.integers(1, 4))
WINDOWS = st.one_of(FITTING, FITTING, FITTING, st.builds(Window, ANY_PAIR, ANY_PAIR, ANY_PAIR))


def refuses(run: Callable[..., object], arguments: dict[str, Any], window: Window) -> bool:
    tensors = [arguments[name] for name in ("input", "offset", "weight", "bias")]
    try:
        run(*tensors, window, arguments["mask"])
    except (ShapeError, RuntimeError):
        return True
    return False


@NEEDS_NATIVE
@settings(max_examples=300)
@given(st.lists(CHANGES, max_size=2), WINDOWS)
def test_the_operator_refuses_what_the_checks_refuse(
    changes: list[dict[str, Any]], window: Window
) -> None:
    """So that nothing is lost where the checks are asked only after the operator refused."""
    arguments = dict(GOOD)
    for each in changes:
        arguments |= each
    assume(all(arguments[name] is None or arguments[name].numel() for name in ("bias", "mask")))
    is_refused = refuses(check_arguments, arguments, window)
    event("refused" if is_refused else "taken")
    assert refuses(deform_conv2d_native, arguments, window) == is_refused


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_an_empty_tensor_is_not_taken_for_none(name: str) -> None:
    with pytest.raises(ShapeError, match=f"`{name}` has"):
        deform_conv2d(**GOOD | {name: torch.zeros(0)})
