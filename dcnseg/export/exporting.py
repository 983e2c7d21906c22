"""Export of a run to a file that other programs run; entry point `export_network`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from torch.export import ExportedProgram

from dcnseg.checkpoint import find_weights, load_segmenter
from dcnseg.config import EXPORT_SUFFIXES, ExportConfig
from dcnseg.errors import ConfigError
from dcnseg.export.graph import ExportedNetwork, make_program
from dcnseg.export.metadata import make_metadata
from dcnseg.export.onnx_file import OnnxRunner, write_onnx
from dcnseg.export.openvino_file import OpenvinoRunner, write_openvino
from dcnseg.export.operators import check_layers, with_torchvision_layers
from dcnseg.export.parity import Image, Parity, Runner, compare_outputs
from dcnseg.export.program_file import ProgramRunner, write_program
from dcnseg.inference.optional_packages import import_package
from dcnseg.inference.predictor import Predictor
from dcnseg.models.segmenter import Segmenter
from dcnseg.ops._native import missing_reason

_PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "pt2": (),
}
_WRITERS: Final[Mapping[str, Callable[[ExportedProgram, tuple[str, ...], Path, str], None]]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "pt2": write_program,
}


@dataclass(frozen=True)
class ExportResult:
    """The files of an exported model, and how much it differs from its network."""

    paths: tuple[Path, ...]
    parity: Parity
    has_region_head: bool  # which was not exported


def export_network(
    run: Path,
    out: Path,
    config: ExportConfig,
    images: Sequence[Image] = (),
    *,
    overwrite: bool = False,
) -> ExportResult:
    """Write a run's network in another format, after comparing it with the original.

    Args:
        run: Run folder or weights file.
        out: The file to write, with the suffix of its format. OpenVINO has a .bin file beside it.
        config: Format, input and outputs.
        images: Images to compare on besides random ones, RGB, uint8 [H, W, 3].
        overwrite: Whether to replace an existing file.

    Raises:
        CheckpointError: The weights are missing or damaged.
        ConfigError: `out` has another suffix or exists, or a package is not installed.
        ExportError: A layer cannot be expressed in the format, or the results differ; no file is
            written then.
    """
    _check_out(out, config.format, overwrite=overwrite)
    for package in _PACKAGES[config.format]:
        import_package(package)
    model, info = load_segmenter(find_weights(run))
    check_layers(model, config.format)
    network = _without_region_head(model)
    predictor = Predictor(network, info.class_map, info.preprocessing, device=torch.device("cpu"))
    is_own_operator = config.format == "onnx" and missing_reason("cpu") is None
    exported = network if is_own_operator else with_torchvision_layers(network)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".") as folder:
        path = Path(folder) / out.name

        def write(config: ExportConfig) -> Parity:
            graph = ExportedNetwork(
                exported, info.class_map, info.preprocessing, config.input, config.outputs
            )
            metadata = make_metadata(info, config)
            _WRITERS[config.format](make_program(graph), config.outputs, path, metadata)
            return compare_outputs(_open(path, config), predictor, config, images)

        # The logits show differences that the labels hide, so they are always compared.
        if "logits" in config.outputs:
            parity = write(config)
        else:
            parity = write(replace(config, outputs=(*config.outputs, "logits")))
            write(config)
        names = sorted(path.name for path in Path(folder).iterdir())  # .bin before .xml
        for name in names:
            os.replace(Path(folder) / name, out.parent / name)  # noqa: PTH105  (atomic)
    paths = tuple(out.parent / name for name in names)
    return ExportResult(paths, parity, has_region_head=model.region_head is not None)


def _without_region_head(model: Segmenter) -> Segmenter:
    """Return a copy of a network without its region head, in the default memory format."""
    copy = deepcopy(model).to(memory_format=torch.contiguous_format).float().eval()
    copy.region_head = None
    return copy


def _open(path: Path, config: ExportConfig) -> Runner:
    if config.format == "onnx":
        return OnnxRunner(path)
    if config.format == "openvino":
        return OpenvinoRunner(path)
    return ProgramRunner(path, config.outputs)


def _check_out(out: Path, format: str, *, overwrite: bool) -> None:
    suffix = EXPORT_SUFFIXES[format]
    if out.suffix != suffix:
        raise ConfigError(
            f"--out is {out}, but files of --format {format} end in {suffix}. Use {suffix}, or "
            "choose another --format."
        )
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; expected a file to write.")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists. Choose another name or add --overwrite.")
