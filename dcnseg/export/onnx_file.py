"""ONNX: `write_onnx` and `OnnxRunner`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
import torch
from torch.export import ExportedProgram

from dcnseg.checkpoint import METADATA_KEY
from dcnseg.errors import ExportError
from dcnseg.export.operators import onnx_translations
from dcnseg.inference.onnx_network import IMAGE, open_session
from dcnseg.inference.optional_packages import import_package
from dcnseg.ops._native import missing_reason

_OPSET: Final = 22  # the newest with a DeformConv
_MAX_BYTES: Final = 2**31 - 1  # of a protobuf message


def write_onnx(
    program: ExportedProgram, outputs: tuple[str, ...], path: Path, metadata: str
) -> None:
    """Write a program as ONNX, with the weights in the same file.

    Raises:
        ConfigError: The packages onnx and onnxscript are not installed.
        ExportError: The file would be larger than 2 GiB, which ONNX does not support.
    """
    for package in ("onnx", "onnxscript"):
        import_package(package)
    # Without native operators, the program has those of torchvision, which torch.onnx translates.
    table = onnx_translations() if missing_reason("cpu") is None else None
    exported = torch.onnx.export(
        program,
        input_names=[IMAGE],
        output_names=list(outputs),
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
        custom_translation_table=table,
    )
    assert exported is not None
    model: Any = exported.model_proto
    _name_sides(model.graph)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, metadata
    if (size := model.ByteSize()) > _MAX_BYTES:
        raise ExportError(
            f"the network has {size / 2**30:.1f} GiB, but an ONNX file holds at most 2 GiB. Use "
            "--format openvino or pt2."
        )
    path.write_bytes(model.SerializeToString())


def _name_sides(graph: Any) -> None:
    """Name the sides of images, which have the names and formulas of the trace, such as "s62"."""
    (image,) = graph.input
    sides = [side.dim_param for side in image.type.tensor_type.shape.dim if side.dim_param]
    names = dict(zip(sides, ("batch", "height", "width"), strict=True))
    for value in (image, *graph.output):
        shape = value.type.tensor_type.shape.dim
        for side, axis in zip(shape, (*shape[:-2], "height", "width"), strict=True):
            if side.dim_param:
                side.dim_param = names.get(side.dim_param, f"{value.name}_{axis}")
    del graph.value_info[:]  # of intermediate results


class OnnxRunner:
    """Runs an ONNX file with ONNX Runtime on the CPU."""

    def __init__(self, path: Path) -> None:
        self._session = open_session(import_package("onnxruntime"), path)
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, image: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Compute the outputs by their names."""
        return dict(zip(self._names, self._session.run(None, {IMAGE: image}), strict=True))
