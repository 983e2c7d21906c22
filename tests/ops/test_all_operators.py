"""What every operator does in every mode, on the CPU; `tests.gpu` checks the same on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from benchmarks.common import gradient_like
from dcnseg.errors import NativeOpsError
from dcnseg.ops.backend import Backend
from dcnseg.ops.deform_conv import native as deform_conv_native
from dcnseg.ops.roi import native as roi_native
from tests.gpu.cases import BOXES, Convolution, OperatorCase, as_leaves, make_cases
from tests.gpu.checks import LAYOUTS, RecordedCalls, check_registration
from tests.ops.common import NEEDS_NATIVE, layouts

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Large enough for the vector and the GEMM code.
CONVOLUTION = Convolution(48, 24, (17, 17), modulated=True, bias=True, batch=3)
POOLINGS = [case for case in make_cases() if case.operator != "deform_conv2d"]
CASES = [CONVOLUTION.case(), *POOLINGS]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_pooling = pytest.mark.parametrize("case", POOLINGS, ids=str)


@NEEDS_NATIVE
@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_that_of_pytorch_in_the_same_dtype(
    dtype: torch.dtype, case: OperatorCase
) -> None:
    tensors = case.make(dtype)
    ours, rivals = case.results(tensors, "native"), case.results(tensors, "reference")
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    epsilon = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    for name, truth in case.results(exact, "reference").items():
        assert ours[name].dtype == rivals[name].dtype == dtype
        error, rival = ((each[name].double() - truth).abs().max() for each in (ours, rivals))
        assert error <= max(2 * rival, epsilon * truth.abs().max()), name


@NEEDS_NATIVE
@each_case
def test_strides_have_no_effect(case: OperatorCase) -> None:
    tensors = case.make(torch.float64)
    given = {**tensors, "grad": gradient_like(case.call("native", tensors))}
    expected = case.results(tensors, "native", given["grad"])
    for name, tensor in given.items():
        for order, same in layouts(tensor).items():
            moved = {**given, name: same}
            grad = moved.pop("grad")
            result = case.results(moved, "native", grad)
            torch.testing.assert_close(result, expected, msg=f"{name} {order}")
            is_channels_last = result["output"].is_contiguous(memory_format=torch.channels_last)
            assert is_channels_last == ((name, order) == ("input", "channels-last"))


@each_pooling
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_keeps_the_memory_format_of_the_input(
    layout: str, case: OperatorCase, backend: Backend
) -> None:
    tensors = case.make(torch.float32)
    tensors["input"] = tensors["input"].contiguous(memory_format=LAYOUTS[layout])
    assert case.call(backend, tensors).is_contiguous(memory_format=LAYOUTS[layout])


@NEEDS_NATIVE
@each_case
def test_expanded_tensors(case: OperatorCase) -> None:
    tensors = case.make(torch.float64)
    tensors["input"] = tensors["input"][:1].expand_as(tensors["input"])
    if "mask" in tensors:
        tensors["mask"] = tensors["mask"][:, :1].expand_as(tensors["mask"])
    grad = torch.randn((), dtype=torch.float64).expand_as(case.call("native", tensors))
    full = {name: tensor.contiguous() for name, tensor in tensors.items()}
    torch.testing.assert_close(
        case.results(tensors, "native", grad), case.results(full, "native", grad.contiguous())
    )


@NEEDS_NATIVE
@pytest.mark.usefixtures("same_threads_after")
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_reproducible(dtype: torch.dtype, case: OperatorCase) -> None:
    """The number of threads changes only the rounding of the convolution."""
    tensors = case.make(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    if case in POOLINGS:
        tensors["input"] = tensors["input"].repeat(1, 3, 1, 1)  # enough for several threads
        tolerance = 0
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        once, again = (case.results(tensors, "native") for _ in range(2))
        torch.testing.assert_close(once, again, rtol=0, atol=0)
        results.append(once)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=tolerance, atol=tolerance)


@NEEDS_NATIVE
@each_case
def test_gradients_can_be_computed_separately(case: OperatorCase) -> None:
    tensors = case.make(torch.float64)
    expected = case.results(tensors, "native")
    for name in tensors.keys() - {BOXES}:
        leaf = tensors[name].clone().requires_grad_()
        with RecordedCalls() as recorded:
            output = case.call("native", {**tensors, name: leaf})
            (ours,) = torch.autograd.grad(output, leaf, gradient_like(output))
        torch.testing.assert_close(ours, expected[f"gradient of {name}"])
        for operator, arguments in recorded.calls[1:]:  # the backward
            torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


@NEEDS_NATIVE
@each_case
def test_second_derivative_raises(case: OperatorCase) -> None:
    tensors = as_leaves(case.make(torch.float32))
    total = case.call("native", tensors).square().sum()
    (gradient,) = torch.autograd.grad(total, tensors["input"], create_graph=True)
    with pytest.raises(NativeOpsError, match="not twice differentiable"):
        gradient.sum().backward()


@NEEDS_NATIVE
@each_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, case: OperatorCase) -> None:
    check_registration(CPU, case, layout)


# torch's own forward-mode rules are scripted on first use.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@NEEDS_NATIVE
@each_case
def test_forward_mode_and_torch_func_use_the_reference(case: OperatorCase) -> None:
    tensors = case.make(torch.float64)
    leaves = {name: tensor for name, tensor in tensors.items() if name != BOXES}
    values, tangents = tuple(leaves.values()), tuple(map(torch.randn_like, leaves.values()))

    def call(backend: Backend) -> Callable[..., Tensor]:
        return lambda *values: case.call(
            backend, {**tensors, **dict(zip(leaves, values, strict=True))}
        )

    jvp: Any = torch.func.jvp
    _, tangent = expected = jvp(call("reference"), values, tangents)
    torch.testing.assert_close(jvp(call("auto"), values, tangents), expected)
    assert tangent.abs().max() > 0.1
    with forward_ad.dual_level():
        output = call("auto")(*map(forward_ad.make_dual, values, tangents))
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, tangent)
    with pytest.raises(NativeOpsError, match=r"supports neither torch\.func nor forward-mode"):
        jvp(call("native"), values, tangents)


@NEEDS_NATIVE
@each_case
def test_meta_tensors_have_shapes(case: OperatorCase) -> None:
    tensors = case.make(torch.float32)
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert case.call("native", on_meta).shape == case.call("native", tensors).shape


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("module", "operator", "self_test"),
    [
        (deform_conv_native, "deform_conv2d_native", deform_conv_native.cuda_self_test),
        (roi_native, "roi_pool_native", roi_native.roi_pool_self_test),
        (roi_native, "roi_avg_pool_native", roi_native.roi_avg_pool_self_test),
        (roi_native, "deform_roi_pool_native", roi_native.deform_roi_pool_self_test),
    ],
)
def test_self_test_accepts_correct_kernels_only(
    module: Any, operator: str, self_test: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs on the CPU, with the code that tests a GPU."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert self_test(CPU) is None
    native = getattr(module, operator)
    for factor, reason in ((1.1, "relative error 0.1"), (math.nan, "relative error nan")):
        wrong = lambda *given, factor=factor, **named: native(*given, **named) * factor  # noqa: E731
        monkeypatch.setattr(module, operator, wrong)
        assert self_test(CPU).startswith(f"failed its self-test on cpu: {reason}")

    def fail(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(module, operator, fail)
    assert self_test(CPU) == "failed its self-test on cpu: no kernel image is available"


@each_pooling
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_box_gives_nan_and_no_input_gradient(
    bad: float, case: OperatorCase, backend: Backend
) -> None:
    tensors = case.make(torch.float64)
    others = [region for region in range(20) if region != 2]
    fewer = {
        name: tensor if name == "input" else tensor[others] for name, tensor in tensors.items()
    }
    tensors[BOXES][2, 3] = bad
    grad = gradient_like(case.call(backend, tensors))
    result = case.results(tensors, backend, grad)
    expected = case.results(fewer, backend, grad[others])
    torch.testing.assert_close(result.pop("gradient of input"), expected.pop("gradient of input"))
    for name in result:  # the output and the gradient of the offset
        assert result[name][2].isnan().all()
        torch.testing.assert_close(result[name][others], expected[name])


@each_pooling
@pytest.mark.parametrize(("batch", "regions", "channels"), [(2, 0, 32), (0, 0, 32), (2, 3, 0)])
def test_empty_tensors(
    batch: int, regions: int, channels: int, case: OperatorCase, backend: Backend
) -> None:
    tensors = case.make(torch.float32)
    shape = case.call(backend, tensors).shape
    empty = {name: tensor[:regions] for name, tensor in tensors.items()}
    empty["input"] = tensors["input"][:batch, :channels]
    result = case.results(empty, backend)
    assert result.pop("output").shape == (regions, shape[1] if channels else 0, *shape[2:])
    for name, gradient in result.items():
        assert gradient.shape == empty[name.removeprefix("gradient of ")].shape
        assert not gradient.any()


@each_pooling
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_dtypes_of_boxes_and_offset_have_no_effect(
    dtype: torch.dtype, case: OperatorCase, backend: Backend
) -> None:
    low = {name: tensor.to(dtype) for name, tensor in case.make(dtype).items()}
    low["input"] = low["input"].float()
    exact = {name: tensor.float() for name, tensor in low.items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = case.call(backend, low)
    torch.testing.assert_close(output, case.call(backend, exact), rtol=0, atol=0)


@each_pooling
def test_list_of_boxes_is_the_tensor_with_indices(case: OperatorCase, backend: Backend) -> None:
    tensors: dict[str, Any] = case.make(torch.float64)
    boxes = tensors[BOXES][tensors[BOXES][:, 0].argsort()]
    expected = case.call(backend, tensors | {BOXES: boxes})
    parts = [boxes[boxes[:, 0] == image][:, 1:] for image in (0, 1)]
    output = case.call(backend, tensors | {BOXES: parts})
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
