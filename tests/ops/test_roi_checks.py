from __future__ import annotations

import math
import re
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, tensor, zeros
from torch._subclasses.fake_tensor import FakeTensorMode

from dcnseg.errors import ConfigError, ShapeError
from dcnseg.ops import (
    DeformPSRoIPool,
    deform_ps_roi_pool,
    deform_roi_pool,
    ps_roi_pool,
    roi_avg_pool,
    roi_pool,
)
from dcnseg.ops.roi.checks import Mode

# Without native operators, "auto" warns once per process.
pytestmark = pytest.mark.filterwarnings("ignore:dcnseg uses the slower:RuntimeWarning")

POOLS = [roi_pool, roi_avg_pool, ps_roi_pool]
MMCV_POOL = partial(deform_roi_pool, mode="mmcv")
MXNET_PS = partial(deform_ps_roi_pool, mode="mxnet")

GOOD: dict[str, Any] = {
    "input": zeros(2, 12, 6, 7),
    "boxes": tensor([[0.0, 1, 1, 4, 4], [1, 0, 2, 5, 5], [1, 0, 0, 9, 9]]),
    "output_size": (2, 3),
}
GOOD_OFFSET: dict[str, Any] = {**GOOD, "offset": zeros(3, 2, 2, 3)}


NAN, INF = math.nan, math.inf
FLOATING = "expected float64, float32, bfloat16 or float16."
INDEX = "has the batch index"
BOXES = "expected an [R, 5] tensor or a list with one [Ri, 4] tensor per image."


def box(index: float) -> Tensor:
    return tensor([[0.0, 1, 1, 4, 4], [index, 1, 1, 4, 4]])


def check_error(error: type[Exception], pool: Any, message: str, **changes: Any) -> None:
    good = GOOD if pool in POOLS else GOOD_OFFSET
    with pytest.raises(error, match=re.escape(message)):
        pool(**(good | changes))


PAIR = "expected one or two integers"
BAD: list[tuple[str, Any, str]] = [
    ("input", zeros(12, 6, 7), "`input` has the shape [12, 6, 7]; expected 4 dimensions, [B, C"),
    ("input", zeros(2, 12, 6, 7).long(), f"`input` is torch.int64; {FLOATING}"),
    ("input", zeros(2, 12, 0, 7), "`input` is 0x7 (height x width); expected 1 to 2147483647 pix"),
    ("input", zeros(1).expand(2, 12, 2**16, 2**15), "`input` is 65536x32768 (height x width); exp"),
    ("input", zeros(0, 12, 6, 7), f"`boxes[0]` {INDEX} 0; expected no boxes, because `input`"),
    ("boxes", zeros(3, 4), "`boxes` has the shape [3, 4]; expected [R, 5] with the columns batch"),
    ("boxes", zeros(5), "`boxes` has the shape [5]; expected [R, 5]"),
    ("boxes", zeros(3, 5).long(), f"`boxes` is torch.int64; {FLOATING}"),
    ("boxes", zeros(3, 5, device="meta"), "`boxes` is on meta, but `input` is on cpu. Move both"),
    ("boxes", [zeros(3, 4)], "`boxes` is a list of 1 tensors, but `input` has 2 images. Pass one"),
    ("boxes", [zeros(3, 4), zeros(2, 5)], "`boxes[1]` has the shape [2, 5]; expected [Ri, 4] with"),
    ("boxes", [[1, 2, 3, 4]] * 2, "`boxes[0]` is a list; expected a tensor."),
    ("boxes", None, f"`boxes` is a NoneType; {BOXES}"),
    ("boxes", np.zeros((3, 5)), f"`boxes` is a ndarray; {BOXES}"),
    ("boxes", (each for each in [zeros(1, 4)]), f"`boxes` is a generator; {BOXES}"),
    ("boxes", box(2), f"`boxes[1]` {INDEX} 2; expected an integer from 0 to 1, because `input`"),
    ("boxes", box(-1), f"`boxes[1]` {INDEX} -1; expected an integer"),
    ("boxes", box(0.5), f"`boxes[1]` {INDEX} 0.5; expected an integer"),
    ("boxes", box(NAN), f"`boxes[1]` {INDEX} nan; expected an integer"),
    ("output_size", 0, f"`output_size` is 0; {PAIR} of at least 1."),
    ("output_size", (2, 3, 4), f"`output_size` is (2, 3, 4); {PAIR}"),
    ("output_size", (2.0, 3), f"`output_size` is (2.0, 3); {PAIR}"),
    *(("output_size", size, f"; {PAIR}") for size in (3.0, None, True, (2, 0), "3", tensor(3))),
]


@pytest.mark.parametrize("pool", [*POOLS, deform_roi_pool, deform_ps_roi_pool])
@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_argument_raises_a_shape_error(pool: Any, name: str, value: Any, message: str) -> None:
    check_error(ShapeError, pool, message, **{name: value})


@pytest.mark.parametrize("pool", POOLS)
def test_good_arguments_pass(pool: Any) -> None:
    assert pool(**GOOD).shape == (3, 2 if pool is ps_roi_pool else 12, 2, 3)
    lists = GOOD | {"boxes": (torch.rand(3, 4), zeros(0, 4))}
    assert pool(**lists).shape[0] == 3
    assert deform_roi_pool(**GOOD_OFFSET).shape == (3, 12, 2, 3)
    assert deform_ps_roi_pool(**GOOD_OFFSET).shape == (3, 2, 2, 3)


NOT_NUMBERS = [None, "1", True, tensor(1.0)]
NO_COUNTS = [2.0, None, True, tensor(2), 2**16 + 1]
COUNT = "an integer from"
SCALE = "a number above 0 and below 2**100, such as 1/16 for a map with an output stride of 16."
OFFSET_CHANNELS = "expected 2 (x, y) per class, and a number of classes that divides the 2 output"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("offset", zeros(3, 2, 3, 2), "[3, 2, 3, 2]; expected [3, 2*classes, 2, 3] for 3"),
        ("offset", zeros(2, 2, 2, 3), "has the shape [2, 2, 2, 3]; expected [3, 2"),
        ("offset", zeros(3, 2), "has the shape [3, 2]; expected [3, 2"),
        *(("offset", zeros(3, n, 2, 3), f"has {n} channels; {OFFSET_CHANNELS}") for n in (3, 6, 0)),
        ("offset", zeros(3, 2, 2, 3).int(), f"is torch.int32; {FLOATING}"),
        ("offset", zeros(3, 2, 2, 3, device="meta"), "is on meta, but `input` is on cpu."),
        ("offset", np.zeros((3, 2, 2, 3)), "`offset` is a ndarray; expected a tensor."),
        ("offset", [0.0], "`offset` is a list; expected a tensor."),
        ("offset", 0, "`offset` is a int; expected a tensor."),
        ("part_size", (4, 4), "expected [3, 2*classes, 4, 4] for 3 boxes of 4x4 parts."),
        ("part_size", 0, f"`part_size` is 0; {PAIR} of at least 1."),
        ("group_size", -1, f"`group_size` is -1; {PAIR} of at least 1."),
        ("group_size", (5, 2), "expected a multiple of 5*2 = 10, the number of groups"),
    ],
)
def test_bad_offset_or_groups_raise_a_shape_error(name: str, value: Any, message: str) -> None:
    check_error(ShapeError, deform_ps_roi_pool, message, **{name: value})


def test_channels_must_match_bins_and_groups() -> None:
    message = "`offset` has 4 channels; deform_roi_pool expects 2, (x, y) of every bin."
    check_error(ShapeError, deform_roi_pool, message, offset=zeros(3, 4, 2, 3))
    message = (
        "`input` has 12 channels; expected a multiple of 5*1 = 5, the number of groups of "
        "`output_size`, because each group of bins has its own channels."
    )
    check_error(ShapeError, ps_roi_pool, message, output_size=(5, 1))


@pytest.mark.parametrize(
    ("pool", "name", "value", "expected"),
    [
        (roi_pool, "backend", "fast", '"auto", "native" or "reference".'),
        (ps_roi_pool, "corners", "round", '"torchvision" or "rfcn".'),
        (deform_roi_pool, "mode", "caffe", '"paper", "mmcv" or "mxnet".'),
        (deform_ps_roi_pool, "mode", "mmcv", '"paper" or "mxnet".'),
        *((roi_pool, "spatial_scale", v, "a number.") for v in NOT_NUMBERS),
        *((roi_pool, "spatial_scale", v, SCALE) for v in (0, 0.0, -1.0, 2.0**100, INF, NAN)),
        *((deform_roi_pool, "gamma", v, "a number.") for v in [*NOT_NUMBERS, 1j]),
        (deform_roi_pool, "gamma", INF, "a finite number, such as"),
        *((MMCV_POOL, "sampling_ratio", v, f"{COUNT} 0 to 65536.") for v in [-1, *NO_COUNTS]),
        *((MXNET_PS, "samples_per_part", v, f"{COUNT} 1 to 65536.") for v in [0, *NO_COUNTS]),
    ],
)
def test_setting_out_of_range(pool: Any, name: str, value: Any, expected: str) -> None:
    message = f"`{name}` is {value!r}; expected {expected}"
    check_error(ConfigError, pool, message, **{name: value})


def test_paper_mode_samples_every_pixel() -> None:
    message = 'is 2; mode="paper" samples every pixel and supports only'
    check_error(ConfigError, deform_roi_pool, f"{message} 0. Use 0, mode=", sampling_ratio=2)
    check_error(ConfigError, deform_ps_roi_pool, f"{message} the default, 4.", samples_per_part=2)


@pytest.mark.parametrize("mode", ["mmcv", "mxnet"])
def test_numpy_scalars_are_accepted(mode: Mode) -> None:
    output = deform_roi_pool(
        **(GOOD_OFFSET | {"output_size": (np.int64(2), 3)}),
        mode=mode,
        spatial_scale=cast(float, np.float32(0.5)),
        gamma=cast(float, np.float64(0.1)),
        sampling_ratio=cast(int, np.int64(2)),
    )
    assert output.shape == (3, 12, 2, 3)
    assert output.dtype == torch.float32


def test_fake_tensors_pass() -> None:
    with FakeTensorMode():
        assert roi_pool(zeros(1, 2, 4, 4), zeros(3, 5), 2).shape == (3, 2, 2, 2)


def test_offset_maps_must_have_the_size_of_the_input() -> None:
    with pytest.raises(ConfigError, match=r"`kernel_size` is 2; expected an odd integer"):
        DeformPSRoIPool(2, 1.0, 4, kernel_size=2)
    layer = DeformPSRoIPool(2, 1.0, 4)
    with pytest.raises(ShapeError, match="expected the same height and width"):
        layer(zeros(1, 4, 6, 6), zeros(0, 5), zeros(1, 4, 3, 3))
