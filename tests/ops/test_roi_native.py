from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dcnseg.errors import NativeOpsError
from dcnseg.ops import (
    deform_ps_roi_pool,
    deform_roi_pool,
    ps_roi_pool,
    roi_avg_pool,
    roi_pool,
)
from dcnseg.ops.backend import Backend
from dcnseg.ops.roi import native as roi_native
from dcnseg.ops.roi.geometry import locate_regions, make_bins, make_samples
from tests.ops.common import NEEDS_GPU, NEEDS_NATIVE, layouts

pytestmark = NEEDS_NATIVE

Call: TypeAlias = Callable[[Tensor, Tensor, Tensor, Backend], Tensor]

SIZE_AND_SCALE: dict[str, Any] = {"output_size": (2, 4), "spatial_scale": 0.5}


def plain(pool: Callable[..., Tensor], **options: Any) -> Call:
    return lambda x, b, _, backend: pool(x, b, **SIZE_AND_SCALE, **options, backend=backend)


def moved(pool: Callable[..., Tensor], **options: Any) -> Call:
    return lambda x, b, o, backend: pool(x, b, o, **SIZE_AND_SCALE, **options, backend=backend)


# Every operator and mode on [2, 8 * channels, 9, 11] at a scale of 0.5, with bins of 2x4 and
# offsets of 2x4 parts. Sizes are powers of two, so that float32 and float64 have the same bins.
CALLS: dict[str, Call] = {
    "max": plain(roi_pool),
    "avg": plain(roi_avg_pool),
    "ps": plain(ps_roi_pool),
    "rfcn": plain(ps_roi_pool, corners="rfcn"),
    "still": plain(partial(deform_roi_pool, offset=None)),
    "paper": moved(deform_roi_pool),
    "mmcv": moved(deform_roi_pool, mode="mmcv"),
    "mxnet": moved(deform_roi_pool, mode="mxnet"),
    "ps paper": moved(deform_ps_roi_pool, group_size=(1, 2)),
    "ps mxnet": moved(deform_ps_roi_pool, mode="mxnet"),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_tensors(dtype: torch.dtype = torch.float32, channels: int = 3) -> tuple[Tensor, ...]:
    """Input, boxes in eighths of a pixel, some partly outside the map, and offsets."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 8 * channels, 9, 11, generator=generator)
    boxes = torch.rand(20, 5, generator=generator) * torch.tensor([2.0, 24, 20, 30, 26])
    boxes = (boxes * 8).round() / 8 - torch.tensor([0.0, 4, 4, 4, 4])
    boxes[:, 0] = torch.arange(20) % 2
    offset = torch.randn(20, 2, 2, 4, generator=generator)
    return input.to(dtype), boxes, offset.to(dtype)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def run(
    call: Call, input: Tensor, boxes: Tensor, offset: Tensor, backend: Backend, grad: Tensor
) -> list[Tensor]:
    """Output and gradients of input and offset, zero where there is none."""
    output = call(input, boxes, offset, backend)
    gradients = torch.autograd.grad(
        output, (input, offset), grad.to(output.dtype), materialize_grads=True, allow_unused=True
    )
    return [output.detach(), *gradients]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_pytorch_in_the_same_dtype(
    dtype: torch.dtype, name: str
) -> None:
    call = CALLS[name]
    input, boxes, offset = make_tensors(dtype)
    low = leaves(input, offset)
    exact = leaves(input.double(), offset.double())
    grad = torch.randn_like(call(input, boxes, offset, "reference")).double()
    ours = run(call, low[0], boxes, low[1], "native", grad)
    plain = run(call, low[0], boxes, low[1], "reference", grad)
    truth = run(call, exact[0], boxes.double(), exact[1], "reference", grad)
    for what, result, rival, expected in zip(
        ("output", "input", "offset"), ours, plain, truth, strict=True
    ):
        assert result.dtype == rival.dtype == dtype
        if dtype == torch.float64:  # the reference itself
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
            continue
        rounding = float(expected.abs().max()) * torch.finfo(dtype).eps
        error = float((result.double() - expected).abs().max())
        allowed = 2 * float((rival.double() - expected).abs().max())
        assert error <= max(allowed, rounding), what


@pytest.mark.parametrize("name", CALLS)
def test_strides_have_no_effect(name: str) -> None:
    call = CALLS[name]
    tensors = make_tensors(torch.float64)
    grad = torch.randn_like(call(tensors[0], tensors[1], tensors[2], "reference"))
    expected = run(call, *_with_gradients(tensors), "native", grad)
    for place in range(4):
        for order, same in layouts((*tensors, grad)[place]).items():
            moved = [*tensors, grad]
            moved[place] = same
            result = run(call, *_with_gradients(tuple(moved[:3])), "native", moved[3])
            torch.testing.assert_close(result, expected, msg=f"{place} {order}")


def _with_gradients(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves with the strides of the tensors."""
    input, boxes, offset = tensors
    return input.detach().requires_grad_(), boxes, offset.detach().requires_grad_()


@pytest.mark.parametrize("name", CALLS)
def test_expanded_input_and_gradient(name: str) -> None:
    call = CALLS[name]
    input, boxes, offset = make_tensors(torch.float64)
    wide = input[:1].expand(2, -1, -1, -1)
    grad = torch.randn((), dtype=torch.float64).expand(call(input, boxes, offset, "native").shape)
    expanded = run(call, *_with_gradients((wide, boxes, offset)), "native", grad)
    full = run(
        call, *_with_gradients((wide.contiguous(), boxes, offset)), "native", grad.contiguous()
    )
    torch.testing.assert_close(expanded, full)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_output_keeps_the_memory_format_of_the_input(name: str, backend: Backend) -> None:
    input, boxes, offset = make_tensors()
    assert CALLS[name](input, boxes, offset, backend).is_contiguous()
    channels_last = input.contiguous(memory_format=torch.channels_last)
    output = CALLS[name](channels_last, boxes, offset, backend)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("same_threads_after")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_bitwise_reproducible_with_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    input, boxes, offset = make_tensors(dtype, channels=9)
    low = leaves(input, offset)
    grad = torch.randn_like(call(input, boxes, offset, "native"))
    expected = run(call, low[0], boxes, low[1], "native", grad)
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        again = run(call, low[0], boxes, low[1], "native", grad)
        torch.testing.assert_close(again, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["paper", "mxnet"])
def test_gradients_can_be_computed_separately(name: str) -> None:
    call = CALLS[name]
    input, boxes, offset = make_tensors()
    grad = torch.randn_like(call(input, boxes, offset, "native"))
    _, in_grad, offset_grad = run(call, *_with_gradients((input, boxes, offset)), "native", grad)
    alone = input.clone().requires_grad_()
    (ours,) = torch.autograd.grad(call(alone, boxes, offset, "native"), alone, grad)
    torch.testing.assert_close(ours, in_grad, rtol=0, atol=0)
    alone = offset.clone().requires_grad_()
    (ours,) = torch.autograd.grad(call(input, boxes, alone, "native"), alone, grad)
    torch.testing.assert_close(ours, offset_grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["max", "avg", "ps", "paper"])
def test_second_derivative_raises(name: str) -> None:
    input, boxes, offset = make_tensors()
    (leaf,) = leaves(input)
    output = CALLS[name](leaf, boxes, offset, "native").square().sum()
    (gradient,) = torch.autograd.grad(output, leaf, create_graph=True)
    with pytest.raises(NativeOpsError, match="not twice differentiable"):
        gradient.sum().backward()


# opcheck reads .grad of a non-leaf tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool) -> None:
    input, boxes, offset = make_tensors(torch.float64, channels=1)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    input, boxes = input.contiguous(memory_format=memory_format), boxes[:4]
    leaf = input.clone(memory_format=memory_format).requires_grad_()
    regions = locate_regions(boxes, input)
    bins = make_bins(regions, (2, 4), 0.5, (9, 11))
    samples, _ = make_samples("mmcv", regions, (2, 4), 0.5, (9, 11), 0)
    shift = offset[:4].clone().requires_grad_()
    ops, check = torch.ops.dcnseg, torch.library.opcheck
    check(ops.roi_pool.default, (leaf, bins, 2, 4, channels_last))
    check(ops.roi_avg_pool.default, (leaf, bins, 2, 4, 2, 4, channels_last))
    check(ops.deform_roi_pool.default, (leaf, samples, shift, 2, 4, 1, 1, 1, channels_last))
    none = torch.empty(0, dtype=torch.float64)
    check(ops.deform_roi_pool.default, (leaf, samples, none, 2, 4, 1, 2, 2, channels_last))
    output, argmax = ops.roi_pool(input, bins, 2, 4, channels_last)
    grad = torch.randn_like(output)
    check(ops.roi_pool_backward.default, (grad, input, bins, argmax))
    check(ops.roi_avg_pool_backward.default, (grad, input, bins, 2, 4, 1, 1))
    backward = (grad, input, samples, shift.detach(), 2, 4, 1, 1, 1)
    check(ops.deform_roi_pool_backward.default, (*backward, True, True))
    check(ops.deform_roi_pool_backward.default, (*backward, False, True))


class All(nn.Module):
    """All operators on one map."""

    def forward(self, input: Tensor, boxes: Tensor, offset: Tensor) -> list[Tensor]:
        return [
            CALLS[name](input, boxes, offset, "auto")
            for name in ("max", "rfcn", "mmcv", "ps paper")
        ]


def total(outputs: list[Tensor]) -> Tensor:
    return torch.stack([output.square().sum() for output in outputs]).sum()


def test_compiles_without_a_graph_break_for_any_number_of_boxes() -> None:
    compiled = torch.compile(All(), fullgraph=True, backend="aot_eager")
    input, boxes, offset = make_tensors()
    for count in (5, 20):
        results = []
        for model in (All(), compiled):
            x, o = leaves(input, offset[:count])
            some = boxes[:count].clone()
            for tensor in (some, o):
                torch._dynamo.mark_dynamic(tensor, 0)
            outputs = model(x, some, o)
            results.append([*outputs, *torch.autograd.grad(total(outputs), (x, o))])
        torch.testing.assert_close(*results)
    some[1, 0] = 2.0  # raises in eager mode
    for output in compiled(x, some, o):
        assert output[1].isnan().all()


def test_exports_with_any_number_of_boxes() -> None:
    input, boxes, offset = make_tensors()
    count = torch.export.Dim("count", min=2, max=1000)
    program = torch.export.export(
        All(), (input, boxes[:5], offset[:5]), dynamic_shapes=(None, {0: count}, {0: count})
    )
    torch.testing.assert_close(program.module()(input, boxes, offset), All()(input, boxes, offset))


# torch's own forward-mode rules are scripted on first use.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("name", ["max", "ps", "paper", "mxnet"])
def test_forward_mode_and_torch_func_use_the_reference(name: str) -> None:
    input, boxes, offset = make_tensors(torch.float64, channels=1)
    tangent = torch.randn_like(input)

    def call(backend: Backend) -> Callable[[Tensor], Tensor]:
        return lambda input: CALLS[name](input, boxes, offset, backend)

    expected = torch.func.jvp(call("reference"), (input,), (tangent,))
    ours = torch.func.jvp(call("auto"), (input,), (tangent,))
    torch.testing.assert_close(ours, expected)
    assert ours[1].abs().max() > 0.1
    with forward_ad.dual_level():
        output = call("auto")(forward_ad.make_dual(input, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, expected[1])
    with pytest.raises(NativeOpsError, match=r"supports neither torch\.func nor forward-mode"):
        torch.func.jvp(call("native"), (input,), (tangent,))


@pytest.mark.parametrize("name", ["roi_pool", "roi_avg_pool", "deform_roi_pool"])
def test_self_test_accepts_correct_kernels_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on the CPU, with the code that tests a GPU."""
    cpu = torch.device("cpu")
    test = getattr(roi_native, f"{name}_self_test")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert test(cpu) is None
    native = getattr(roi_native, f"{name}_native")
    for factor, reason in ((1.1, "relative error 0.1"), (math.nan, "relative error nan")):
        monkeypatch.setattr(
            roi_native,
            f"{name}_native",
            lambda *arguments, factor=factor: native(*arguments) * factor,
        )
        reason_given = test(cpu)
        assert reason_given is not None
        assert reason_given.startswith("failed its self-test on cpu")
        assert reason in reason_given


def test_meta_tensors_have_shapes() -> None:
    input, boxes, offset = (tensor.to("meta") for tensor in make_tensors())
    for name, call in CALLS.items():
        assert call(input, boxes, offset, "native").shape[0] == 20, name


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gpu_equals_reference(channels_last: bool, name: str, dtype: torch.dtype) -> None:
    call: Any = CALLS[name]
    input, boxes, offset = make_tensors(dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    low = leaves(input.cuda().contiguous(memory_format=memory_format), offset.cuda())
    exact = leaves(input.double(), offset.double())
    grad = torch.randn(20, input.shape[1], 2, 4)[:, : call(input, boxes, offset, "auto").shape[1]]
    ours = run(call, low[0], boxes.cuda(), low[1], "native", grad.cuda())
    truth = run(call, exact[0], boxes.double(), exact[1], "reference", grad.double())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)
    for result, expected in zip(ours, truth, strict=True):
        scale = float(expected.abs().max()) + 1e-30
        torch.testing.assert_close(result.cpu().double(), expected, rtol=0, atol=tolerance * scale)
