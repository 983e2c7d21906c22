"""OpenVINO IR: `write_openvino` and `OpenvinoRunner`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt
from torch.export import ExportedProgram

from dcnseg.checkpoint import METADATA_KEY
from dcnseg.inference.onnx_network import IMAGE
from dcnseg.inference.optional_packages import import_package


def write_openvino(
    program: ExportedProgram, outputs: tuple[str, ...], path: Path, metadata: str
) -> None:
    """Write a program as an .xml file, and its weights as a .bin file beside it.

    The deformable layers of the program must call torchvision's operator, because OpenVINO has no
    rule for that of dcnseg, and none for the DeformConv of ONNX.

    Raises:
        ConfigError: The package openvino is not installed.
    """
    openvino = import_package("openvino")
    model = openvino.convert_model(program)
    for port, name in zip((*model.inputs, *model.outputs), (IMAGE, *outputs), strict=True):
        port.get_tensor().set_names({name})
    model.reshape({IMAGE: openvino.PartialShape(_image_shape(program))})
    model.set_rt_info(metadata, [METADATA_KEY])
    openvino.save_model(model, path, compress_to_fp16=False)


def _image_shape(program: ExportedProgram) -> list[int]:
    """The shape of the input, with -1 for sides of any length, which conversion may forget."""
    (image,) = (node for node in program.graph.nodes if node.name == IMAGE)
    return [side if isinstance(side, int) else -1 for side in image.meta["val"].shape]


class OpenvinoRunner:
    """Runs an OpenVINO file on the CPU in float32."""

    def __init__(self, path: Path) -> None:
        openvino = import_package("openvino")
        settings = {"INFERENCE_PRECISION_HINT": "f32"}  # some CPUs default to bfloat16
        self._model = openvino.Core().compile_model(path, "CPU", settings)

    def __call__(self, image: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Compute the outputs by their names."""
        results = self._model([image])
        return {port.get_any_name(): results[port] for port in self._model.outputs}
