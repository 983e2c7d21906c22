from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dcnseg.errors import NativeOpsError
from dcnseg.ops import DeformConv2d, deform_conv2d
from dcnseg.ops.deform_conv import native as deform_conv_native
from tests.ops.common import NEEDS_GPU, NEEDS_NATIVE, layouts

pytestmark = NEEDS_NATIVE


def make_tensors(
    batch: int = 2, channels: int = 32, size: int = 9, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input, offset, weight, bias and mask of a padded 3x3 convolution, as leaves."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    return (
        leaf(batch, channels, size, size),
        leaf(batch, 18, size, size),
        leaf(24, channels, 3, 3),
        leaf(24),
        leaf(batch, 9, size, size),
    )


def convolve(tensors: tuple[Tensor, ...]) -> Tensor:
    input, offset, weight, bias, mask = tensors
    return deform_conv2d(input, offset, weight, bias, 1, 1, 1, mask, backend="native")


def gradients(tensors: tuple[Tensor, ...], output: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, tensors, grad)


@pytest.mark.parametrize("which", ["input", "offset", "weight", "mask", "grad"])
def test_strides_of_an_argument_have_no_effect(which: str) -> None:
    tensors = make_tensors()
    grad = torch.randn(2, 24, 9, 9)
    expected_output = convolve(tensors)
    expected = gradients(tensors, expected_output, grad)
    place = ["input", "offset", "weight", "bias", "mask", "grad"].index(which)
    for name, same in layouts((*tensors, grad)[place].detach()).items():
        moved = [*tensors, grad]
        moved[place] = same if which == "grad" else same.requires_grad_()
        output = convolve(tuple(moved[:5]))
        torch.testing.assert_close(output, expected_output, msg=name)
        is_channels_last = output.is_contiguous(memory_format=torch.channels_last)
        assert is_channels_last == (which == "input" and name == "channels-last"), name
        torch.testing.assert_close(
            gradients(tuple(moved[:5]), output, moved[5]), expected, msg=name, rtol=1e-5, atol=1e-4
        )


def test_expanded_input_mask_and_gradient() -> None:
    input, offset, weight, bias, mask = (tensor.detach() for tensor in make_tensors())
    wide = (
        input[:1].expand(2, -1, -1, -1),
        offset,
        weight,
        bias,
        mask[:, :1].expand(-1, 9, -1, -1),
    )
    grad = torch.randn(()).expand(2, 24, 9, 9)
    results = []
    for arguments in (wide, tuple(tensor.contiguous() for tensor in wide)):
        leaves = tuple(tensor.requires_grad_() for tensor in arguments)
        output = convolve(leaves)
        results.append((output, *gradients(leaves, output, grad)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_is_bitwise_reproducible(dtype: torch.dtype) -> None:
    tensors = make_tensors(batch=3, channels=48, size=17, dtype=dtype)
    grad = torch.randn(3, 24, 17, 17).to(dtype)
    first = gradients(tensors, convolve(tensors), grad)
    for _ in range(3):
        torch.testing.assert_close(
            first, gradients(tensors, convolve(tensors), grad), rtol=0, atol=0
        )


@pytest.mark.usefixtures("same_threads_after")
def test_number_of_threads_changes_only_rounding() -> None:
    tensors = make_tensors(batch=3, channels=48, size=17)
    grad = torch.randn(3, 24, 17, 17)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = convolve(tensors)
        results.append((output, *gradients(tensors, output, grad)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-4)


def test_gradients_can_be_computed_separately() -> None:
    tensors = make_tensors()
    grad = torch.randn(2, 24, 9, 9)
    expected = gradients(tensors, convolve(tensors), grad)
    for place in range(5):
        alone = [tensor.detach() for tensor in tensors]
        alone[place].requires_grad_()
        (ours,) = torch.autograd.grad(convolve(tuple(alone)), alone[place], grad)
        torch.testing.assert_close(ours, expected[place])


def test_tiles_that_span_images_and_end_early() -> None:
    """3069 positions of 4608 columns make three tiles; the last one is shorter."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(3, 512, 33, 31, generator=generator)
    offset = torch.randn(3, 18, 33, 31, generator=generator)
    weight = torch.randn(16, 512, 3, 3, generator=generator)
    grad = torch.randn(3, 16, 33, 31, generator=generator)

    def run(backend: Literal["native", "reference"]) -> tuple[Tensor, ...]:
        leaves = [tensor.requires_grad_() for tensor in (input, offset, weight)]
        output = deform_conv2d(leaves[0], leaves[1], leaves[2], padding=1, backend=backend)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    for ours, theirs in zip(run("native"), run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def test_second_derivative_raises() -> None:
    tensors = make_tensors()
    (gradient,) = torch.autograd.grad(convolve(tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(NativeOpsError, match="not twice differentiable"):
        gradient.sum().backward()


# opcheck reads .grad of a non-leaf tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_opcheck() -> None:
    input, offset, weight, bias, mask = make_tensors(dtype=torch.float64, size=5)
    none = torch.empty(0, dtype=torch.float64)
    window = (1, 1, 1, 1, 1, 1, 0)
    forward = torch.ops.dcnseg.deform_conv2d.default
    channels_last = input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(
        forward, (channels_last, offset, mask, weight, bias, *window, False, False, True)
    )
    torch.library.opcheck(
        forward, (channels_last, offset, none, weight, none, *window, True, True, False)
    )
    plain = [tensor.detach() for tensor in (channels_last, offset, mask, weight)]
    torch.library.opcheck(
        torch.ops.dcnseg.deform_conv2d_backward.default,
        (torch.randn(2, 24, 5, 5, dtype=torch.float64), *plain, *window, *(True,) * 5),
    )


def test_exports_and_compiles_with_dynamic_shapes() -> None:
    layer = DeformConv2d(8, 6, 3, padding=1, modulated=True)
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.2)
    batch, height, width = (torch.export.Dim(name, min=1, max=64) for name in ("b", "h", "w"))
    exported = torch.export.export(
        layer, (torch.randn(2, 8, 7, 6),), dynamic_shapes={"input": {0: batch, 2: height, 3: width}}
    ).module()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(2, 8, 9, 12, requires_grad=True))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 8, 9, 12), (3, 8, 20, 5)):
            input = torch.randn(size, requires_grad=True)
            output = layer(input)
            torch.testing.assert_close(exported(input), output)
            torch.testing.assert_close(compiled(input), output)
            (expected,) = torch.autograd.grad(output.sum(), input)
            (ours,) = torch.autograd.grad(compiled(input).sum(), input)
            torch.testing.assert_close(ours, expected)


def test_unaligned_input_reads_zeros_outside() -> None:
    raw = bytearray(4 * 32 + 8)
    for start in range(4):
        values = torch.frombuffer(raw, dtype=torch.float32, count=32, offset=start)
        values.copy_(torch.arange(1.0, 33.0))
        input = values.view(1, 4, 4, 2).permute(0, 3, 1, 2)  # channels-last
        far = torch.full((1, 2, 4, 4), 100.0)
        weight = torch.ones(1, 2, 1, 1)
        assert deform_conv2d(input, far, weight, backend="native").abs().max() == 0
        exact = deform_conv2d(input, 0 * far, weight, backend="native")
        torch.testing.assert_close(exact, input.sum(1, keepdim=True))


def test_wrong_direct_calls_raise() -> None:
    input, offset, mask = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(0)
    weight, bias = torch.zeros(3, 2, 1, 1), torch.zeros(3)
    numbers = (1, 1, 0, 0, 1, 1, 0)

    def call(**changed: Tensor) -> Tensor:
        good = {"input": input, "offset": offset, "mask": mask, "weight": weight, "bias": bias}
        tensors = (good | changed).values()
        output: Tensor = torch.ops.dcnseg.deform_conv2d(*tensors, *numbers, *(False,) * 3)
        return output

    assert call().shape == (1, 3, 4, 4)
    for wrong in (
        {"input": torch.zeros(1, 2, 4, 8)[..., ::2]},
        {"input": torch.zeros(1, 2, 0, 4)},
        {"input": input.double()},
        {"offset": torch.zeros(1, 2, 4, 5).half()},
        {"offset": torch.zeros(1, 3, 4, 4)},
        {"mask": torch.zeros(1, 2, 4, 4)},
        {"weight": torch.zeros(3, 3, 1, 1)},
        {"weight": torch.zeros(3, 0, 1, 1)},
        {"bias": torch.zeros(2)},
    ):
        with pytest.raises(RuntimeError):
            call(**wrong)


def test_self_test_accepts_correct_kernels_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs on the CPU, with the code that tests a GPU."""
    cpu = torch.device("cpu")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert deform_conv_native.cuda_self_test(cpu) is None
    native = deform_conv_native.deform_conv2d_native
    for factor, reason in ((1.1, "relative error 0.1"), (math.nan, "relative error nan")):
        monkeypatch.setattr(
            deform_conv_native,
            "deform_conv2d_native",
            lambda *arguments, factor=factor, **options: native(*arguments, **options) * factor,
        )
        reason_given = deform_conv_native.cuda_self_test(cpu)
        assert reason_given is not None
        assert reason_given.startswith("failed its self-test on cpu")
        assert reason in reason_given

    def fail(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(deform_conv_native, "deform_conv2d_native", fail)
    reason_given = deform_conv_native.cuda_self_test(cpu)
    assert reason_given == "failed its self-test on cpu: no kernel image is available"


def test_fused_kernel_is_disabled_if_only_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on the CPU, where a wrapper produces the wrong results."""
    native = deform_conv_native.deform_conv2d_native
    unfused: set[int | None] = set()
    monkeypatch.setattr(deform_conv_native, "_unfused_gpus", unfused)

    def run(*arguments: Any, fused: bool, **options: Any) -> Tensor:
        return native(*arguments, fused=fused, **options) * (1.1 if fused else 1)

    monkeypatch.setattr(deform_conv_native, "deform_conv2d_native", run)
    with pytest.warns(RuntimeWarning, match="the fused kernel failed its self-test on cpu:0: "):
        assert deform_conv_native.cuda_self_test(torch.device("cpu", 0)) is None
    assert unfused == {0}


@pytest.fixture
def cudnn_precisions() -> Iterator[list[Any]]:
    """Torch's settings for convolutions and for recurrent networks, restored afterwards."""
    cudnn: Any = torch.backends.cudnn
    settings = [cudnn.conv, cudnn.rnn]
    before = [setting.fp32_precision for setting in settings]
    yield settings
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


@pytest.mark.parametrize(
    ("convolutions", "recurrent", "allowed"), [("ieee", "tf32", False), ("tf32", "ieee", True)]
)
def test_tf32_follows_the_setting_of_convolutions(
    convolutions: str, recurrent: str, allowed: bool, cudnn_precisions: list[Any]
) -> None:
    """Also if that of recurrent networks differs, where the older setting raises."""
    cudnn_precisions[0].fp32_precision = convolutions
    cudnn_precisions[1].fp32_precision = recurrent
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert deform_conv_native._allows_tf32(on_gpu) is allowed
    on_gpu.dtype = torch.bfloat16
    assert not deform_conv_native._allows_tf32(on_gpu)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_gpu_equals_reference(
    dtype: torch.dtype, fused: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of several tiles and, where images are copied, of several groups of images."""
    generator = torch.Generator().manual_seed(0)
    gpu = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(deform_conv_native, "_unfused_gpus", set() if fused else {gpu.index})

    def leaf(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(gpu, like).requires_grad_()

    positions = torch.promote_types(dtype, torch.float32)
    input, weight, bias = leaf(5, 128, 96, 97), leaf(40, 64, 3, 3), leaf(40)
    offset, mask = leaf(5, 36, 96, 97, like=positions), leaf(5, 18, 96, 97, like=positions)
    order = torch.channels_last if channels_last else torch.contiguous_format
    grad = torch.randn(5, 40, 96, 97, generator=generator).to(gpu, dtype)
    results = []
    for backend in ("native", "reference"):
        exact = torch.float64 if backend == "reference" else dtype
        tensors = [t.detach().to(exact).requires_grad_() for t in (input, weight, bias)]
        places = [t.detach().to(torch.promote_types(exact, positions)) for t in (offset, mask)]
        image, kernel = (t.contiguous(memory_format=order) for t in tensors[:2])
        leaves = [*tensors, *(t.requires_grad_() for t in places)]
        output = deform_conv2d(
            image, places[0], kernel, tensors[2], 1, 1, 1, places[1],
            backend="native" if backend == "native" else "reference",
        )  # fmt: skip
        assert output.is_contiguous(memory_format=order)
        grads = torch.autograd.grad(output, leaves, grad.to(exact))
        results.append((output, *grads))
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-3}.get(dtype, 3e-2)
    for ours, truth in zip(*results, strict=True):
        scale = float(truth.detach().abs().max())
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=tolerance * scale)


@pytest.mark.gpu
@NEEDS_GPU
def test_gpu_gradients_of_positions_are_bitwise_reproducible() -> None:
    tensors = tuple(tensor.detach().cuda().requires_grad_() for tensor in make_tensors())
    grad = torch.randn(2, 24, 9, 9, device="cuda")
    first, second = (gradients(tensors, convolve(tensors), grad) for _ in range(2))
    for place in (1, 4):  # offset and mask, whose sums have a fixed order
        torch.testing.assert_close(first[place], second[place], rtol=0, atol=0)


@pytest.mark.gpu
@NEEDS_GPU
def test_gpu_graph_captures_forward_and_backward() -> None:
    tensors = tuple(tensor.detach().cuda().requires_grad_() for tensor in make_tensors())
    grad = torch.randn(2, 24, 9, 9, device="cuda")

    def run() -> tuple[Tensor, ...]:
        output = convolve(tensors)
        return output, *gradients(tensors, output, grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # the self-test, and the initialization of cuBLAS
        expected = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("channels_last", [False, True])
def test_gpu_scratch_memory_is_bounded(channels_last: bool) -> None:
    """At most 64 MiB in addition to input, output and gradients, for any batch size."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    gpu = torch.device("cuda")
    input = torch.randn(8, 64, 256, 256, device=gpu, dtype=torch.bfloat16)
    input = input.contiguous(memory_format=order).requires_grad_()
    weight = torch.randn(64, 64, 3, 3, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    offset = torch.randn(8, 18, 256, 256, device=gpu, requires_grad=True)

    def run() -> Tensor:
        output = deform_conv2d(input, offset, weight, padding=1, backend="native")
        torch.autograd.grad(output, [input, offset, weight], torch.ones_like(output))
        return output

    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = run()
    needed = 2 * output.nbytes + sum(t.nbytes for t in (input, offset, weight))
    assert torch.cuda.max_memory_allocated() - before - needed <= 64 << 20


# torch's own forward-mode rules are scripted on first use.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_forward_mode_and_torch_func_use_the_reference() -> None:
    tensors = tuple(tensor.detach().double() for tensor in make_tensors(channels=4, size=5))
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)

    def run(backend: Literal["auto", "native", "reference"]) -> Callable[..., Tensor]:
        def call(*arguments: Tensor) -> Tensor:
            input, offset, weight, bias, mask = arguments
            return deform_conv2d(input, offset, weight, bias, 1, 1, 1, mask, backend=backend)

        return call

    expected, expected_tangent = torch.func.jvp(run("reference"), tensors, tangents)  # type: ignore[misc]
    output, tangent = torch.func.jvp(run("auto"), tensors, tangents)  # type: ignore[misc]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(tangent, expected_tangent)
    assert tangent.abs().max() > 0.1
    with forward_ad.dual_level():
        duals = tuple(map(forward_ad.make_dual, tensors, tangents))
        torch.testing.assert_close(
            forward_ad.unpack_dual(run("auto")(*duals)).tangent, expected_tangent
        )
    with pytest.raises(NativeOpsError, match=r"supports neither torch\.func nor forward-mode"):
        torch.func.jvp(run("native"), tensors, tangents)
