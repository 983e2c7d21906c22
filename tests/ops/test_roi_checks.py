from __future__ import annotations

import math
import re
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
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

GOOD: dict[str, Any] = {
    "input": torch.zeros(2, 12, 6, 7),
    "boxes": torch.tensor([[0.0, 1, 1, 4, 4], [1, 0, 2, 5, 5], [1, 0, 0, 9, 9]]),
    "output_size": (2, 3),
}
GOOD_OFFSET: dict[str, Any] = {**GOOD, "offset": torch.zeros(3, 2, 2, 3)}


def box(index: float) -> Tensor:
    return torch.tensor([[0.0, 1, 1, 4, 4], [index, 1, 1, 4, 4]])


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"input": torch.zeros(12, 6, 7)},
        "`input` has the shape [12, 6, 7]; expected 4 dimensions, [B, C",
    ),
    (
        {"input": torch.zeros(2, 12, 6, 7, dtype=torch.int64)},
        "`input` is torch.int64; expected float64, float32, bfloat16 or float16.",
    ),
    (
        {"input": torch.zeros(2, 12, 0, 7)},
        "`input` is 0x7 (height x width); expected 1 to 2147483647 pixels.",
    ),
    (
        {"input": torch.zeros(1).expand(2, 12, 2**16, 2**15)},
        "`input` is 65536x32768 (height x width); expected 1 to 2147483647 pixels.",
    ),
    (
        {"boxes": torch.zeros(3, 4)},
        "`boxes` has the shape [3, 4]; expected [R, 5] with the columns batch index, x1, y1, x2, "
        "y2, or a list with one [Ri, 4] tensor per image.",
    ),
    ({"boxes": torch.zeros(5)}, "`boxes` has the shape [5]; expected [R, 5]"),
    (
        {"boxes": torch.zeros(3, 5, dtype=torch.int64)},
        "`boxes` is torch.int64; expected float64, float32, bfloat16 or float16.",
    ),
    (
        {"boxes": torch.zeros(3, 5, device="meta")},
        "`boxes` is on meta, but `input` is on cpu. Move both to the same device.",
    ),
    (
        {"boxes": [torch.zeros(3, 4)]},
        "`boxes` is a list of 1 tensors, but `input` has 2 images. Pass one tensor per image, "
        "[0, 4] for an image without boxes.",
    ),
    (
        {"boxes": [torch.zeros(3, 4), torch.zeros(2, 5)]},
        "`boxes[1]` has the shape [2, 5]; expected [Ri, 4] with the columns x1, y1, x2, y2.",
    ),
    ({"boxes": [[1, 2, 3, 4]] * 2}, "`boxes[0]` is a list; expected a tensor."),
    (
        {"boxes": box(2)},
        "`boxes[1]` has the batch index 2; expected an integer from 0 to 1, because `input` has 2 "
        "images. The columns are batch index, x1, y1, x2, y2.",
    ),
    ({"boxes": box(-1)}, "`boxes[1]` has the batch index -1; expected an integer"),
    ({"boxes": box(0.5)}, "`boxes[1]` has the batch index 0.5; expected an integer"),
    ({"boxes": box(math.nan)}, "`boxes[1]` has the batch index nan; expected an integer"),
    (
        {"input": torch.zeros(0, 12, 6, 7)},
        "`boxes[0]` has the batch index 0; expected no boxes, because `input` has 0 images.",
    ),
    ({"output_size": 0}, "`output_size` is 0; expected one or two integers of at least 1."),
    ({"output_size": (2, 3, 4)}, "`output_size` is (2, 3, 4); expected one or two integers"),
    ({"output_size": (2.0, 3)}, "`output_size` is (2.0, 3); expected one or two integers"),
]


@pytest.mark.parametrize("pool", [*POOLS, deform_roi_pool, deform_ps_roi_pool])
@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_argument_raises_a_shape_error(
    pool: Any, changes: dict[str, Any], message: str
) -> None:
    good = GOOD if pool in POOLS else GOOD_OFFSET
    with pytest.raises(ShapeError, match=re.escape(message)):
        pool(**(good | changes))


@pytest.mark.parametrize("pool", POOLS)
def test_good_arguments_pass(pool: Any) -> None:
    assert pool(**GOOD).shape == (3, 2 if pool is ps_roi_pool else 12, 2, 3)
    lists = GOOD | {"boxes": (torch.rand(3, 4), torch.zeros(0, 4))}
    assert pool(**lists).shape[0] == 3
    assert deform_roi_pool(**GOOD_OFFSET).shape == (3, 12, 2, 3)
    assert deform_ps_roi_pool(**GOOD_OFFSET).shape == (3, 2, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"offset": torch.zeros(3, 2, 3, 2)},
            "`offset` has the shape [3, 2, 3, 2]; expected [3, 2*classes, 2, 3] for 3 boxes of 2x3 "
            "parts.",
        ),
        (
            {"offset": torch.zeros(2, 2, 2, 3)},
            "`offset` has the shape [2, 2, 2, 3]; expected [3, 2",
        ),
        ({"offset": torch.zeros(3, 2)}, "`offset` has the shape [3, 2]; expected [3, 2"),
        (
            {"offset": torch.zeros(3, 3, 2, 3)},
            "`offset` has 3 channels; expected 2 (x, y) per class, and a number of classes "
            "that divides the 2 output channels.",
        ),
        ({"offset": torch.zeros(3, 6, 2, 3)}, "`offset` has 6 channels; expected 2 (x, y) per"),
        ({"offset": torch.zeros(3, 0, 2, 3)}, "`offset` has 0 channels; expected 2 (x, y) per"),
        (
            {"offset": torch.zeros(3, 2, 2, 3, dtype=torch.int32)},
            "`offset` is torch.int32; expected float64, float32, bfloat16 or float16.",
        ),
        (
            {"offset": torch.zeros(3, 2, 2, 3, device="meta")},
            "`offset` is on meta, but `input` is on cpu. Move both to the same device.",
        ),
        (
            {"group_size": (5, 2)},
            "`input` has 12 channels; expected a multiple of 5*2 = 10, the number of groups of "
            "`group_size`, because each group of bins has its own channels.",
        ),
        ({"part_size": (4, 4)}, "expected [3, 2*classes, 4, 4] for 3 boxes of 4x4 parts."),
        ({"part_size": 0}, "`part_size` is 0; expected one or two integers of at least 1."),
        ({"group_size": -1}, "`group_size` is -1; expected one or two integers of at least 1."),
    ],
)
def test_bad_offset_or_groups_raise_a_shape_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)):
        deform_ps_roi_pool(**(GOOD_OFFSET | changes))


def test_channels_must_match_bins_and_groups() -> None:
    message = "`offset` has 4 channels; deform_roi_pool expects 2, (x, y) of every bin."
    with pytest.raises(ShapeError, match=re.escape(message)):
        deform_roi_pool(**(GOOD_OFFSET | {"offset": torch.zeros(3, 4, 2, 3)}))
    message = "`input` has 12 channels; expected a multiple of 5*1 = 5, the number of groups"
    with pytest.raises(ShapeError, match=re.escape(message)):
        ps_roi_pool(**(GOOD | {"output_size": (5, 1)}))


@pytest.mark.parametrize(
    ("pool", "changes", "message"),
    [
        (roi_pool, {"backend": "fast"}, '`backend` is \'fast\'; expected "auto", "native" or'),
        (
            roi_pool,
            {"spatial_scale": 0.0},
            "`spatial_scale` is 0.0; expected a number above 0 and below 2**100, such as 1/16 for "
            "a map with an output stride of 16.",
        ),
        (
            ps_roi_pool,
            {"corners": "round"},
            '`corners` is \'round\'; expected "torchvision" or "rfcn".',
        ),
        (
            deform_roi_pool,
            {"mode": "caffe"},
            '`mode` is \'caffe\'; expected "paper", "mmcv" or "mxnet".',
        ),
        (deform_roi_pool, {"gamma": math.inf}, "`gamma` is inf; expected a finite number, such as"),
        (
            deform_roi_pool,
            {"mode": "mmcv", "sampling_ratio": -1},
            "`sampling_ratio` is -1; expected an integer from 0 to 65536.",
        ),
        (
            deform_roi_pool,
            {"sampling_ratio": 2},
            '`sampling_ratio` is 2; mode="paper" samples every pixel and supports only 0. Use 0, '
            'mode="mmcv" or mode="mxnet".',
        ),
        (deform_ps_roi_pool, {"mode": "mmcv"}, '`mode` is \'mmcv\'; expected "paper" or "mxnet".'),
        (
            deform_ps_roi_pool,
            {"samples_per_part": 0},
            "`samples_per_part` is 0; expected an integer from 1 to 65536.",
        ),
        (
            deform_ps_roi_pool,
            {"samples_per_part": 2},
            '`samples_per_part` is 2; mode="paper" samples every pixel and supports only the '
            'default, 4. Use mode="mxnet".',
        ),
    ],
)
def test_setting_out_of_range(pool: Any, changes: dict[str, Any], message: str) -> None:
    good = GOOD if pool in POOLS else GOOD_OFFSET
    with pytest.raises(ConfigError, match=re.escape(message)):
        pool(**(good | changes))


@pytest.mark.parametrize("size", [3.0, None, True, 0, (2, 0), "3", torch.tensor(3)])
def test_output_size_must_be_integers(size: object) -> None:
    with pytest.raises(ShapeError, match=r"`output_size` is .*expected one or two integers"):
        roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(0, 5), cast(int, size))


@pytest.mark.parametrize(
    "scale", [None, "1", True, torch.tensor(1.0), 0, -1.0, 2.0**100, math.inf, math.nan]
)
def test_scale_must_be_a_positive_number(scale: object) -> None:
    with pytest.raises(ConfigError, match=r"`spatial_scale` is .*expected a number"):
        roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(0, 5), 2, cast(float, scale))


@pytest.mark.parametrize("boxes", [None, np.zeros((3, 5)), (box for box in [torch.zeros(1, 4)])])
def test_boxes_must_be_a_tensor_or_a_list(boxes: object) -> None:
    with pytest.raises(ShapeError, match=r"`boxes` is a .*expected an \[R, 5\] tensor or a list"):
        roi_pool(torch.zeros(1, 1, 4, 4), cast(Tensor, boxes), 2)


@pytest.mark.parametrize("gamma", [None, "1", True, 1j, torch.tensor(0.1)])
def test_gamma_must_be_a_number(gamma: object) -> None:
    with pytest.raises(ConfigError, match=r"`gamma` is .*; expected a number\."):
        deform_roi_pool(**GOOD_OFFSET, gamma=cast(float, gamma))


@pytest.mark.parametrize("value", [2.0, None, True, torch.tensor(2), 2**16 + 1])
def test_sample_counts_must_be_integers(value: object) -> None:
    with pytest.raises(ConfigError, match=r"`sampling_ratio` is .*expected an integer from 0"):
        deform_roi_pool(**GOOD_OFFSET, mode="mmcv", sampling_ratio=cast(int, value))
    with pytest.raises(ConfigError, match=r"`samples_per_part` is .*expected an integer from 1"):
        deform_ps_roi_pool(**GOOD_OFFSET, mode="mxnet", samples_per_part=cast(int, value))


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


@pytest.mark.parametrize("pool", [deform_roi_pool, deform_ps_roi_pool])
@pytest.mark.parametrize("offset", [np.zeros((3, 2, 2, 3)), [0.0], 0])
def test_offset_must_be_a_tensor(pool: Any, offset: object) -> None:
    message = f"`offset` is a {type(offset).__name__}; expected a tensor."
    with pytest.raises(ShapeError, match=re.escape(message)):
        pool(**(GOOD_OFFSET | {"offset": offset}))


def test_fake_tensors_pass() -> None:
    with FakeTensorMode():
        assert roi_pool(torch.zeros(1, 2, 4, 4), torch.zeros(3, 5), 2).shape == (3, 2, 2, 2)


def test_offset_maps_must_have_the_size_of_the_input() -> None:
    with pytest.raises(ConfigError, match=r"`kernel_size` is 2; expected an odd integer"):
        DeformPSRoIPool(2, 1.0, 4, kernel_size=2)
    layer = DeformPSRoIPool(2, 1.0, 4)
    with pytest.raises(ShapeError, match="expected the same height and width"):
        layer(torch.zeros(1, 4, 6, 6), torch.zeros(0, 5), torch.zeros(1, 4, 3, 3))
