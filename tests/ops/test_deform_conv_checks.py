from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import zeros

from dcnseg.errors import ShapeError
from dcnseg.ops import deform_conv2d
from dcnseg.ops.deform_conv.checks import Window, check_arguments
from dcnseg.ops.deform_conv.native import deform_conv2d_native
from tests.ops.common import NEEDS_NATIVE

GOOD: dict[str, Any] = {
    "input": zeros(2, 4, 6, 7),
    "offset": zeros(2, 36, 6, 7),
    "weight": zeros(6, 2, 3, 3),
    "bias": zeros(6),
    "mask": zeros(2, 18, 6, 7),
    "padding": 1,
}


def test_good_arguments_pass() -> None:
    assert deform_conv2d(**GOOD).shape == (2, 6, 6, 7)
    assert deform_conv2d(**GOOD | {"padding": [1, np.int64(1)]}).shape == (2, 6, 6, 7)


NO_SIZE = "expected one or two integers of at least"
CONCATENATED = (
    "2*9 = 18 per offset group. With offset_groups=1 that is 2*1*9 = 18. Pass the modulation as "
    "`mask` instead of concatenating it."
)
EXPECTED = (
    "expected [2, 36, 6, 7] for an input of [2, 4, 6, 7], a 3x3 kernel, stride (1, 1), "
    "padding (1, 1) and dilation (1, 1)."
)
BAD: list[tuple[str, Any, str]] = [
    ("input", zeros(4, 6, 7), "has the shape [4, 6, 7]; expected a 4-dimensional tensor."),
    ("bias", zeros(6, 1), "has the shape [6, 1]; expected a 1-dimensional tensor."),
    ("mask", zeros(2, 18, 6, 7).long(), "is torch.int64; expected a floating-point tensor."),
    ("weight", zeros(6, 2, 3, 3).double(), "is torch.float64, but `input` is torch.float32. Con"),
    ("weight", zeros(6, 2, 0, 3), "has the shape [6, 2, 0, 3]"),
    ("weight", zeros(6, 3, 3, 3), "has the shape [6, 3, 3, 3] and `input` has 4 channels; expec"),
    ("weight", zeros(5, 2, 3, 3), "has 5 output channels; expected a multiple of the number of"),
    ("offset", zeros(2, 0, 6, 7), "has 0 channels; a 3x3 kernel needs 2*9"),
    ("offset", zeros(2, 20, 6, 7), "has 20 channels; a 3x3 kernel needs 2*9 = 18 per offset gro"),
    ("offset", zeros(2, 27, 6, 7), f"has 27 channels; a 3x3 kernel needs {CONCATENATED}"),
    ("offset", zeros(2, 54, 6, 7), "has 54 channels, which is 3 offset groups of a 3x3 kernel; 4"),
    ("offset", zeros(2, 36, 6, 8), f"has the shape [2, 36, 6, 8]; {EXPECTED}"),
    ("mask", zeros(2, 9, 6, 7), "has 9 channels; a 3x3 kernel with offset_groups=2 needs 2*9 = 18"),
    ("mask", zeros(1, 18, 6, 7), "has the shape [1, 18, 6, 7]; expected [2, 18, 6, 7]"),
    ("bias", zeros(4), "has 4 elements, but `weight` has 6 output channels."),
    ("stride", True, f"is True; {NO_SIZE} 1."),
    ("stride", 0, f"is 0; {NO_SIZE} 1."),
    ("padding", "same", f"is 'same'; {NO_SIZE} 0."),
    ("padding", (1, -1), f"is (1, -1); {NO_SIZE} 0."),
    ("dilation", (1, 2, 3), f"is (1, 2, 3); {NO_SIZE} 1."),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_argument_raises_a_shape_error(
    name: str, value: Any, message: str, device: str
) -> None:
    arguments: dict[str, Any] = {
        key: each.to(device) if isinstance(each, torch.Tensor) else each
        for key, each in (GOOD | {name: value}).items()
    }
    with pytest.raises(ShapeError, match=re.escape(f"`{name}` {message}")):
        deform_conv2d(**arguments)


def test_wrong_device_and_small_input_raise_a_shape_error() -> None:
    with pytest.raises(ShapeError, match="`offset` is on meta, but `input` is on cpu"):
        deform_conv2d(**GOOD | {"offset": GOOD["offset"].to("meta")})
    small = re.escape("`input` is 6x7 (height x width), which is too small for a 3x3 kernel with ")
    with pytest.raises(ShapeError, match=rf"{small}dilation \(3, 3\) and padding \(0, 0\)\."):
        deform_conv2d(**GOOD | {"padding": 0, "dilation": 3})
    with pytest.raises(ShapeError, match=r"`input` is 0x7 \(height x width\), which is too small"):
        deform_conv2d(**GOOD | {"input": zeros(2, 4, 0, 7)})


def with_size(name: str, dim: int, by: int) -> dict[str, Any]:
    """One of the good tensors with a different size."""
    sizes = list(GOOD[name].shape)
    sizes[dim % len(sizes)] = max(0, sizes[dim % len(sizes)] + by)
    return {name: zeros(sizes)}


TENSORS = st.sampled_from(["input", "offset", "weight", "bias", "mask"])
DTYPES = st.sampled_from([torch.float64, torch.bfloat16, torch.int64, torch.complex64])
CHANGES = st.one_of(
    st.builds(with_size, TENSORS, st.integers(0, 3), st.sampled_from([-18, -2, -1, 1, 2, 9, 18])),
    st.builds(lambda name, dtype: {name: GOOD[name].to(dtype)}, TENSORS, DTYPES),
    st.builds(lambda name: {name: GOOD[name][0]}, TENSORS),
    st.builds(lambda name: {name: None}, st.sampled_from(["bias", "mask"])),
)
VALID_WINDOWS = st.integers(1, 5).map(lambda n: Window((1, 1), (n, n), (n, n)))
ANY_PAIR = st.tuples(st.integers(1, 4), st.integers(1, 4))
WINDOWS = st.one_of(
    VALID_WINDOWS, VALID_WINDOWS, VALID_WINDOWS, st.builds(Window, ANY_PAIR, ANY_PAIR, ANY_PAIR)
)


def raises(run: Callable[..., object], arguments: dict[str, Any], window: Window) -> bool:
    tensors = [arguments[name] for name in ("input", "offset", "weight", "bias")]
    try:
        run(*tensors, window, arguments["mask"])
    except (ShapeError, RuntimeError):
        return True
    return False


@NEEDS_NATIVE
@settings(max_examples=300)
@given(st.lists(CHANGES, max_size=2), WINDOWS)
def test_operator_rejects_what_the_checks_reject(
    changes: list[dict[str, Any]], window: Window
) -> None:
    """The checks run only after the operator raises."""
    arguments = dict(GOOD)
    for each in changes:
        arguments |= each
    assume(all(arguments[name] is None or arguments[name].numel() for name in ("bias", "mask")))
    is_invalid = raises(check_arguments, arguments, window)
    event("invalid" if is_invalid else "valid")
    assert raises(deform_conv2d_native, arguments, window) == is_invalid


@pytest.mark.parametrize("name", ["bias", "mask"])
def test_empty_tensor_is_not_treated_as_none(name: str) -> None:
    with pytest.raises(ShapeError, match=f"`{name}` has"):
        deform_conv2d(**GOOD | {name: zeros(0)})
