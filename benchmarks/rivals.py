"""The deformable convolutions of OpenVINO and ONNX Runtime, forward only, if installed.

Entry point: `make_rivals`. Each library gets the conditions in which it is fastest: the weight as a
constant that it may rearrange once, inputs that it reads in place, and a graph of one node. Both
compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.common import Inputs

Call: TypeAlias = Callable[[], Tensor]

_ONNX_OPSET = 22  # the newest opset with a DeformConv
_ONNX_IR = 10  # the first IR version with this opset


def make_rivals(
    inputs: Inputs, dilation: int, threads: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return calls that convolve `inputs`, and the reasons why other libraries are left out.

    Args:
        inputs: Input [B, C, H, W], offset [B, 18, H, W] and weight [C_out, C, 3, 3].
        dilation: Dilation and padding of the kernel, which keep the size.
        threads: Number of threads of each library.
    """
    reason = _unsupported_reason(inputs)
    if reason:
        return {}, dict.fromkeys(NAMES, reason)
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name, make in _MAKERS.items():
        try:
            calls[name] = make(tuple(each.detach() for each in inputs), dilation, threads)
        except ImportError as error:
            left_out[name] = f"{error}; `pip install .[bench]` installs it"
    return calls, left_out


def installed_versions() -> dict[str, str]:
    versions = {}
    for module in ("openvino", "onnxruntime"):
        try:
            versions[module] = str(import_module(module).__version__)
        except ImportError:
            continue
    return versions


def _unsupported_reason(inputs: Inputs) -> str | None:
    if inputs[0].dtype != torch.float32:
        return "compared in float32 only"
    return None if inputs[0].is_contiguous() else "takes channels-first maps only"


def _make_openvino(inputs: Inputs, dilation: int, threads: int) -> Call:
    openvino: Any = import_module("openvino")
    opset: Any = import_module("openvino.opset8")
    input, offset, weight = (tensor.numpy() for tensor in inputs)
    parameters = [opset.parameter(list(array.shape), array.dtype) for array in (input, offset)]
    node = opset.deformable_convolution(
        *parameters,
        opset.constant(weight),
        strides=[1, 1],
        pads_begin=[dilation, dilation],
        pads_end=[dilation, dilation],
        dilations=[dilation, dilation],
        bilinear_interpolation_pad=True,  # zero padding, as in the other libraries
    )
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # instead of bfloat16, the default on some CPUs
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_HYPER_THREADING": True,  # torch also uses them
        "ENABLE_CPU_PINNING": False,  # pinning would affect the other contenders
    }
    model = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", settings)
    request = model.create_infer_request()

    def call() -> Tensor:
        results = request.infer([input, offset], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return call


def _make_onnxruntime(inputs: Inputs, dilation: int, threads: int) -> Call:
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads spin within a call, the default, but not during the turns of others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(
        _onnx_model(inputs, dilation), options, providers=["CPUExecutionProvider"]
    )
    input, offset, weight = inputs
    output_shape = (input.shape[0], weight.shape[0], *input.shape[2:])

    def call() -> Tensor:
        output = torch.empty(output_shape)
        binding = session.io_binding()
        for name, tensor in (("input", input), ("offset", offset)):
            shape = tuple(tensor.shape)
            binding.bind_input(name, "cpu", 0, "float32", shape, tensor.data_ptr())
        binding.bind_output("output", "cpu", 0, "float32", output_shape, output.data_ptr())
        session.run_with_iobinding(binding)
        return output

    return call


def _onnx_model(inputs: Inputs, dilation: int) -> bytes:
    onnx: Any = import_module("onnx")
    input, offset, weight = inputs
    node = onnx.helper.make_node(
        "DeformConv",
        ["input", "weight", "offset"],
        ["output"],
        kernel_shape=[3, 3],
        pads=[dilation] * 4,
        dilations=[dilation, dilation],
    )
    output_shape = (input.shape[0], weight.shape[0], *input.shape[2:])

    def value(name: str, shape: Sequence[int]) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = onnx.helper.make_graph(
        [node],
        "deform_conv2d",
        [value("input", input.shape), value("offset", offset.shape)],
        [value("output", output_shape)],
        [onnx.numpy_helper.from_array(weight.numpy(), "weight")],
    )
    opset = onnx.helper.make_opsetid("", _ONNX_OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_ONNX_IR)
    content: bytes = model.SerializeToString()
    return content


_MAKERS: Mapping[str, Callable[[Inputs, int, int], Call]] = {
    "OpenVINO": _make_openvino,
    "ONNX Runtime": _make_onnxruntime,
}

NAMES = tuple(_MAKERS)
