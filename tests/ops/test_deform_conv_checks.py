from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from dcnseg.errors import ShapeError
from dcnseg.ops import deform_conv2d

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
    ],
)
def test_message_names_argument_expectation_and_fact(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)):
        deform_conv2d(**GOOD | changes)
