"""The deformable convolutions of OpenVINO and ONNX Runtime, where they are installed; forward only.

Entry point: `make_rivals`. Each gets what it is fastest with: the weight as a constant, which it
may rearrange before the first call, inputs in memory that it reads in place, and a graph of this
one node. Both compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import Tensor

Call: TypeAlias = Callable[[], Tensor]

_ONNX_OPSET = 22  # that of the newest DeformConv
_ONNX_IR = 10  # the first that knows this opset


def make_rivals(
    inputs: tuple[Tensor, ...], dilation: int, threads: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls that convolve `inputs`, and the rivals left out with the reason.

    Args:
        inputs: Input [B, C, H, W], offset [B, 18, H, W] and weight [C_out, C, 3, 3].
        dilation: Of the kernel; the padding, too, so that the size stays.
        threads: That each may use.
    """
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name, make in _MAKERS.items():
        reason = _reason_not_native(inputs)
        if reason is None:
            try:
                calls[name] = make(inputs, dilation, threads)
            except ImportError as error:
                reason = f"{error}; `pip install .[bench]` installs it"
        if reason is not None:
            left_out[name] = reason
    return calls, left_out


def installed_versions() -> dict[str, str]:
    """Versions of those that are there."""
    versions = {}
    for module in ("openvino", "onnxruntime"):
        try:
            versions[module] = str(import_module(module).__version__)
        except ImportError:
            continue
    return versions


def _reason_not_native(inputs: tuple[Tensor, ...]) -> str | None:
    if inputs[0].dtype != torch.float32:
        return "compared in float32 only"
    if not inputs[0].is_contiguous():
        return "takes channels-first maps only"
    return None


def _make_openvino(inputs: tuple[Tensor, ...], dilation: int, threads: int) -> Call:
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
        bilinear_interpolation_pad=True,  # samples fade to zero over the edge, as everybody else's
    )
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 would be taken where the processor has it
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_HYPER_THREADING": True,  # torch counts those as cores, too
        "ENABLE_CPU_PINNING": False,  # it would bind the thread that all contenders share
    }
    model = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", settings)
    request = model.create_infer_request()

    def call() -> Tensor:
        results = request.infer([input, offset], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])

    return call


def _make_onnxruntime(inputs: tuple[Tensor, ...], dilation: int, threads: int) -> Call:
    runtime: Any = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads spin for work within a call, as it is shipped, but not in the turns of others.
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


def _onnx_model(inputs: tuple[Tensor, ...], dilation: int) -> bytes:
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
    shapes = {
        "input": tuple(input.shape),
        "offset": tuple(offset.shape),
        "output": (input.shape[0], weight.shape[0], *input.shape[2:]),
    }
    values = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    }
    graph = onnx.helper.make_graph(
        [node],
        "deform_conv2d",
        [values["input"], values["offset"]],
        [values["output"]],
        [onnx.numpy_helper.from_array(weight.numpy(), "weight")],
    )
    opset = onnx.helper.make_opsetid("", _ONNX_OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_ONNX_IR)
    made: bytes = model.SerializeToString()
    return made


_MAKERS: Mapping[str, Callable[[tuple[Tensor, ...], int, int], Call]] = {
    "OpenVINO": _make_openvino,
    "ONNX Runtime": _make_onnxruntime,
}

NAMES = tuple(_MAKERS)
