from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnseg.errors import ConfigError, NativeOpsError
from dcnseg.ops import deform_conv2d
from dcnseg.ops._native import missing_reason
from dcnseg.ops.backend import Backend
from dcnseg.ops.deform_conv.checks import Border
from tests.ops.common import NEEDS_NATIVE


@dataclass(frozen=True)
class Case:
    batch: int = 2
    channels: int = 4
    out_channels: int = 3
    size_hw: tuple[int, int] = (5, 6)
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = True
    bias: bool = True
    border: Border = "zero"


@dataclass(frozen=True)
class Arguments:
    input: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    case: Case

    @property
    def tensors(self) -> list[Tensor]:
        all_five = (self.input, self.offset, self.weight, self.bias, self.mask)
        return [tensor for tensor in all_five if tensor is not None]

    def to(self, dtype: torch.dtype) -> Arguments:
        """Return the same values as new leaves."""
        leaves: dict[str, Any] = {
            field.name: value.detach().to(dtype, copy=True).requires_grad_()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **leaves)

    def convolve(self, backend: Backend) -> Tensor:
        case = self.case
        return deform_conv2d(
            self.input, self.offset, self.weight, self.bias, case.stride, case.padding,
            case.dilation, self.mask, border=case.border, backend=backend,
        )  # fmt: skip


CASES = [
    Case(),
    Case(modulated=False, bias=False),
    Case(channels=6, groups=3, offset_groups=2, kernel_size=(2, 3), padding=(0, 1)),
    Case(channels=6, out_channels=4, groups=2, offset_groups=3, stride=(2, 1), padding=(2, 1)),
    Case(size_hw=(7, 4), kernel_size=(3, 2), dilation=(2, 3), padding=(2, 3), stride=(1, 2)),
    Case(batch=1, channels=1, out_channels=1, size_hw=(1, 1), kernel_size=(1, 1), padding=(0, 0)),
    Case(batch=3, channels=36, out_channels=20, size_hw=(9, 11), offset_groups=2),
    Case(channels=8, out_channels=8, groups=8, offset_groups=4),
    # Groups that overlap different numbers of offset groups; more than 64 taps times offset groups.
    Case(channels=12, groups=3, offset_groups=2, kernel_size=(7, 7), padding=(3, 3)),
    Case(channels=12, out_channels=4, groups=4, offset_groups=3, kernel_size=(1, 33),
         padding=(0, 16)),
    Case(channels=60, groups=3, offset_groups=20),
]  # fmt: skip


def make_arguments(
    case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 1.5
) -> Arguments:
    """Random leaves whose sampling positions are at least 0.1 pixels from integers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    kh, kw = case.kernel_size
    input = random(case.batch, case.channels, *case.size_hw)
    weight = random(case.out_channels, case.channels // case.groups, kh, kw)
    bias = random(case.out_channels) if case.bias else None
    out = F.conv2d(
        input, weight, None, case.stride, case.padding, case.dilation, case.groups
    ).shape[2:]
    planes = case.offset_groups * kh * kw
    offset = spread * random(case.batch, 2 * planes, *out)
    fraction = offset - offset.floor()
    offset = offset.floor() + 0.1 + 0.8 * fraction
    mask = torch.rand(case.batch, planes, *out, dtype=torch.float64, generator=generator)
    arguments = Arguments(input, offset, weight, bias, mask if case.modulated else None, case)
    return arguments.to(dtype)


def bilinear(plane: Tensor, y: float, x: float) -> float:
    """Sum over all pixels q of G(q, p) * value(q), the formula of the paper."""
    return sum(
        max(0.0, 1 - abs(qy - y)) * max(0.0, 1 - abs(qx - x)) * float(plane[qy, qx])
        for qy in range(plane.shape[0])
        for qx in range(plane.shape[1])
    )


def replicated(plane: Tensor, y: float, x: float) -> float:
    """As in the code of 2017: zero unless 0 <= y < H and 0 <= x < W, the last pixels replicated."""
    height, width = plane.shape
    if not (0 <= y < height and 0 <= x < width):
        return 0.0
    return bilinear(plane, min(y, height - 1.0), min(x, width - 1.0))


def loop_oracle(arguments: Arguments) -> Tensor:
    """Dai et al. 2017, eq. 2-4, one output value at a time."""
    case = arguments.case
    input, offset, weight = arguments.input, arguments.offset, arguments.weight
    batch, _, out_height, out_width = offset.shape
    _, kw = case.kernel_size
    group_channels, taps = weight.shape[1], weight.shape[2] * weight.shape[3]
    outputs_per_group = case.out_channels // case.groups
    channels_per_offset_group = case.channels // case.offset_groups
    output = torch.zeros(batch, case.out_channels, out_height, out_width, dtype=torch.float64)
    for b, o, row, column in torch.cartesian_prod(*map(torch.arange, output.shape)).tolist():
        total = 0.0 if arguments.bias is None else float(arguments.bias[o])
        for i in range(group_channels):
            channel = o // outputs_per_group * group_channels + i
            group = channel // channels_per_offset_group
            for tap in range(taps):
                plane = group * taps + tap
                dy, dx = offset[b, 2 * plane : 2 * plane + 2, row, column].tolist()
                y = row * case.stride[0] - case.padding[0] + tap // kw * case.dilation[0] + dy
                x = column * case.stride[1] - case.padding[1] + tap % kw * case.dilation[1] + dx
                factor = (
                    1.0 if arguments.mask is None else float(arguments.mask[b, plane, row, column])
                )
                kernel = float(weight[o, i, tap // kw, tap % kw])
                if case.border == "dcnv1":
                    value = replicated(input[b, channel], y, x)
                else:
                    value = bilinear(input[b, channel], y, x)
                total += kernel * factor * value
        output[b, o, row, column] = total
    return output


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, channels=2, out_channels=2, size_hw=(3, 4)),
        Case(batch=2, channels=4, out_channels=2, size_hw=(4, 3), groups=2, offset_groups=4,
             kernel_size=(2, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1)),
        Case(batch=1, channels=2, out_channels=2, size_hw=(3, 4), border="dcnv1"),
        Case(batch=1, channels=1, out_channels=1, size_hw=(1, 1), border="dcnv1"),
    ],
)  # fmt: skip
def test_equals_loops(case: Case, backend: Backend) -> None:
    arguments = make_arguments(case)
    with torch.no_grad():
        torch.testing.assert_close(
            arguments.convolve(backend), loop_oracle(arguments), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("case", CASES)
def test_equals_torchvision(case: Case, backend: Backend) -> None:
    arguments = make_arguments(case)
    output = arguments.convolve(backend)
    expected = torchvision.ops.deform_conv2d(
        arguments.input, arguments.offset, arguments.weight, arguments.bias, case.stride,
        case.padding, case.dilation, arguments.mask,
    )  # fmt: skip
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, arguments.tensors, grad),
        torch.autograd.grad(expected, arguments.tensors, grad),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, channels=2, out_channels=2, size_hw=(3, 3)),
        Case(batch=2, channels=4, out_channels=2, size_hw=(3, 2), groups=2, offset_groups=2,
             kernel_size=(2, 2), modulated=False, bias=False),
        Case(batch=1, channels=2, out_channels=2, size_hw=(3, 3), border="dcnv1"),
    ],
)  # fmt: skip
def test_gradcheck(case: Case, backend: Backend) -> None:
    arguments = make_arguments(case)

    def convolve(*tensors: Tensor) -> Tensor:
        input, offset, weight, *rest = tensors
        bias, mask = rest if rest else (None, None)
        return Arguments(input, offset, weight, bias, mask, case).convolve(backend)

    assert torch.autograd.gradcheck(convolve, arguments.tensors)


def test_derivative_at_integer_positions_is_right_handed(backend: Backend) -> None:
    arguments = make_arguments(Case(batch=1, channels=3, out_channels=2))
    exact = replace(arguments, offset=torch.zeros_like(arguments.offset).requires_grad_())
    (gradient,) = torch.autograd.grad(exact.convolve(backend).sum(), exact.offset)
    step = 1e-3  # the output is linear between integers, so the difference is exact
    index = (0, 9, 2, 3)  # dx of the middle tap
    moved = exact.offset.detach().clone()
    moved[index] += step
    difference = replace(exact, offset=moved).convolve(backend) - exact.convolve(backend)
    assert float(difference.detach().sum() / step) == pytest.approx(
        float(gradient[index]), abs=1e-9
    )


# Small kernels, kernels up to 9x9, and lines of up to 33 taps.
KERNEL_SIZES = st.one_of(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(4, 9), st.integers(4, 9)),
    st.tuples(st.just(1), st.sampled_from([5, 17, 33])),
    st.tuples(st.sampled_from([5, 17, 33]), st.just(1)),
)


def spanned(groups: int, offset_groups: int) -> set[int]:
    """The numbers of offset groups that the groups overlap."""
    size = math.lcm(groups, offset_groups) // groups
    of_channel = [channel * offset_groups // (size * groups) for channel in range(size * groups)]
    return {len(set(of_channel[group * size : (group + 1) * size])) for group in range(groups)}


ALL_GROUPS = [(groups, offset_groups) for groups in range(1, 7) for offset_groups in range(1, 13)]
# In half of the cases, some groups overlap more offset groups than others.
GROUPS = st.one_of(
    st.sampled_from([pair for pair in ALL_GROUPS if len(spanned(*pair)) > 1]),
    st.sampled_from(ALL_GROUPS),
)


@st.composite
def draw_case(draw: st.DrawFn) -> Case:
    """A convolution on a small map, usually with few channels."""
    kernel_size = draw(KERNEL_SIZES)
    groups, offset_groups = draw(GROUPS)
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    # At least half of the kernel size, so that the kernel fits on a map of one pixel.
    top, left = (max(2, d * (k - 1) // 2 + 1) for d, k in zip(dilation, kernel_size, strict=True))
    return Case(
        batch=draw(st.integers(1, 2)),
        channels=math.lcm(groups, offset_groups) * draw(st.sampled_from([1, 2, 3, 10])),
        out_channels=groups * draw(st.sampled_from([1, 2, 9])),
        size_hw=draw(st.tuples(st.integers(1, 7), st.integers(1, 7))),
        kernel_size=kernel_size,
        stride=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding=draw(st.tuples(st.integers(top, top + 1), st.integers(left, left + 1))),
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        modulated=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


cases = draw_case()
few = settings(max_examples=25, deadline=None, derandomize=True)


# Tolerances relative to 10 plus the maximum of the result.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@example(case=CASES[-3], order=torch.contiguous_format)
@example(case=CASES[-1], order=torch.channels_last)
@given(case=cases, order=st.sampled_from([torch.contiguous_format, torch.channels_last]))
def test_native_equals_reference(
    dtype: torch.dtype, case: Case, order: torch.memory_format
) -> None:
    low = make_arguments(case, dtype)
    low = replace(low, input=low.input.detach().contiguous(memory_format=order).requires_grad_())
    exact = low.to(torch.float64)
    output, expected_output = low.convolve("native"), exact.convolve("reference")
    grad = torch.randn_like(output)
    ours = [output, *torch.autograd.grad(output, low.tensors, grad)]
    theirs = [expected_output, *torch.autograd.grad(expected_output, exact.tensors, grad.double())]
    for result, expected in zip(ours, theirs, strict=True):
        allowed = TOLERANCES[dtype] * (10 + float(expected.detach().abs().max()))
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=allowed)


@few
@example(case=CASES[2], dy=0, dx=0)
@given(case=cases, dy=st.integers(-2, 2), dx=st.integers(-2, 2))
def test_integer_offset_and_unit_mask_are_a_shifted_plain_convolution(
    backend: Backend, case: Case, dy: int, dx: int
) -> None:
    arguments = make_arguments(case)
    offset = torch.tensor([dy, dx], dtype=torch.float64).repeat(arguments.offset.shape[1] // 2)
    moved = replace(
        arguments,
        offset=offset[:, None, None].expand_as(arguments.offset),
        mask=None if arguments.mask is None else torch.ones_like(arguments.mask),
    )
    top, left = case.padding[0] - dy, case.padding[1] - dx
    bottom, right = case.padding[0] + dy, case.padding[1] + dx
    padded = F.pad(moved.input, (left, right, top, bottom))
    expected = F.conv2d(
        padded, moved.weight, moved.bias, case.stride, 0, case.dilation, case.groups
    )
    torch.testing.assert_close(moved.convolve(backend), expected, rtol=0, atol=1e-10)


@few
@given(case=cases, far=st.sampled_from([30.0, -30.0, 1e9, -1e30]))
def test_samples_outside_give_the_bias_only(backend: Backend, case: Case, far: float) -> None:
    arguments = make_arguments(case)
    outside = replace(arguments, offset=torch.full_like(arguments.offset, far).requires_grad_())
    output = outside.convolve(backend)
    bias = torch.zeros(case.out_channels) if outside.bias is None else outside.bias
    expected = bias.detach().to(torch.float64)[:, None, None].expand_as(output)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(output.sum(), (outside.input, outside.offset, outside.weight))
    assert all(not gradient.any() for gradient in gradients)


def test_samples_near_the_border_are_interpolated_with_zeros(backend: Backend) -> None:
    ones, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
    for y, expected in ((-0.25, 0.75), (-1.0, 0.0), (2.25, 0.75), (2.0, 1.0), (3.0, 0.0)):
        offset = torch.zeros(1, 2, 3, 3)
        offset[0, 0] = y - torch.arange(3.0)[:, None]
        output = deform_conv2d(ones, offset, weight, backend=backend)
        torch.testing.assert_close(output, torch.full_like(output, expected))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_nonfinite_offset_gives_nan_at_its_position_only(
    backend: Backend, bad: float, axis: int
) -> None:
    arguments = make_arguments(Case(channels=20))
    offset = arguments.offset.detach().clone()
    offset[1, 8 + axis, 2, 3] = bad
    broken = replace(arguments, offset=offset.requires_grad_())
    output = broken.convolve(backend)
    assert output[1, :, 2, 3].isnan().all()
    is_nan = output.isnan()
    is_nan[1, :, 2, 3] = False
    assert not is_nan.any()
    in_grad, offset_grad = torch.autograd.grad(output.sum(), (broken.input, broken.offset))
    assert offset_grad[1, 8:10, 2, 3].isnan().all()
    assert int(offset_grad.isnan().sum()) == 2
    assert (
        in_grad.isfinite().all()
    )  # the sample has no position, so that no pixel gets its gradient


@few
@given(
    case=cases,
    values=st.lists(
        st.sampled_from([math.nan, math.inf, -math.inf, 1e38, -1e38, 2.0**31, -(2.0**63), 0.0]),
        min_size=8,
        max_size=8,
    ),
    name=st.sampled_from(["input", "offset", "weight", "mask"]),
)
def test_no_value_crashes(backend: Backend, case: Case, values: list[float], name: str) -> None:
    arguments = make_arguments(replace(case, modulated=True), torch.float32)
    tensor = getattr(arguments, name).detach().clone()
    flat = tensor.view(-1)
    flat[torch.arange(8) * 7919 % flat.numel()] = torch.tensor(values)
    broken = replace(arguments, **{name: tensor.requires_grad_()})
    torch.autograd.grad(broken.convolve(backend).sum(), broken.tensors)


def test_empty_batch(backend: Backend) -> None:
    arguments = make_arguments(Case(batch=0))
    output = arguments.convolve(backend)
    assert output.shape == (0, 3, 5, 6)
    gradients = torch.autograd.grad(output.sum(), arguments.tensors)
    for gradient, tensor in zip(gradients, arguments.tensors, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


BIG = Case(channels=20, out_channels=24, size_hw=(9, 11))


def test_autocast_accepts_mixed_dtypes_and_keeps_positions_exact(backend: Backend) -> None:
    arguments = make_arguments(BIG, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = arguments.convolve(backend)
        mixed = replace(arguments, input=arguments.input.detach().bfloat16()).convolve(backend)
    assert output.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(output, mixed, rtol=0, atol=0)
    explicit = replace(
        arguments,
        input=arguments.input.bfloat16(),
        weight=arguments.weight.bfloat16(),
        bias=None if arguments.bias is None else arguments.bias.bfloat16(),
    ).convolve(backend)
    torch.testing.assert_close(output, explicit, rtol=0, atol=0)
    gradients = torch.autograd.grad(output.float().sum(), arguments.tensors)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_auto_uses_native_operators_if_available() -> None:
    arguments = make_arguments(BIG, torch.float32)
    best: Backend = "reference" if missing_reason("cpu") else "native"
    expected = arguments.convolve(best)
    torch.testing.assert_close(arguments.convolve("auto"), expected, rtol=0, atol=0)


def test_unknown_backend_or_border_raises() -> None:
    with pytest.raises(ConfigError, match='`backend` is \'fast\'; expected "auto", "native" or'):
        make_arguments(Case()).convolve("fast")  # type: ignore[arg-type]
    arguments = make_arguments(Case(border="edge"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='`border` is \'edge\'; expected "zero" or "dcnv1"'):
        arguments.convolve("reference")


def test_native_on_meta_tensors() -> None:
    arguments = make_arguments(Case())
    tensors = {name: getattr(arguments, name).to("meta") for name in ("input", "offset", "weight")}
    on_meta = replace(arguments, **tensors, bias=None, mask=None)
    if missing_reason("cpu") is None:
        assert on_meta.convolve("native").shape == (2, 3, 5, 6)
    else:
        with pytest.raises(NativeOpsError, match="is not available for meta tensors"):
            on_meta.convolve("native")
