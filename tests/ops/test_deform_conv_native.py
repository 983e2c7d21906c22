from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dcnseg.ops import DeformConv2d, deform_conv2d
from dcnseg.ops.deform_conv import native as deform_conv_native
from tests.gpu.cases import Convolution
from tests.gpu.checks import DTYPES, check_accuracy, move_tensors
from tests.ops.common import NEEDS_GPU, NEEDS_NATIVE

pytestmark = NEEDS_NATIVE


def test_tiles_that_span_images_and_end_early() -> None:
    """3069 positions of 4608 columns make three tiles; the last one is shorter."""
    case = Convolution(512, 16, (33, 31), batch=3).case()
    tensors = case.make(torch.float32)
    native = case.results(tensors, "native")
    for name, expected in case.results(tensors, "reference").items():
        tolerance = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(native[name], expected, rtol=0, atol=tolerance)


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
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_equals_reference(dtype: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of several tiles and, where images are copied, of several groups of images."""
    gpu = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(deform_conv_native, "_unfused_gpus", set() if fused else {gpu.index})
    convolution = Convolution(
        128, 40, (96, 97), groups=2, offset_groups=2, modulated=True, bias=True, batch=5
    )
    check_accuracy(gpu, [convolution.case()], dtype)


@pytest.mark.gpu
@NEEDS_GPU
def test_gpu_gradients_of_positions_are_bitwise_reproducible() -> None:
    case = Convolution(32, 24, (9, 9), modulated=True).case()
    tensors = move_tensors(case.make(torch.float32), torch.device("cuda"), "contiguous")
    first, second = (case.results(tensors, "native") for _ in range(2))
    for name in ("gradient of offset", "gradient of mask"):  # whose sums have a fixed order
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


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
