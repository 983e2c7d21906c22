"""`dcnseg info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dcnseg_cli.options import JsonOption
from dcnseg_cli.reporting import echo, print_json, report_errors

EPILOG = """
Examples:

  dcnseg info

  dcnseg info runs/photos --json
"""


@report_errors
def info(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Run folder or weights file to describe."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show versions, devices and native operators, or describe a run."""
    content = _describe_installation() if run is None else _describe_run(run)
    if json:
        print_json({_snake_case(name): value for name, value in content.items()})
    else:
        for line in _lines(content):
            echo(line)


def _describe_installation() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    from dcnseg import __version__
    from dcnseg.device import select_amp_dtype, select_device
    from dcnseg.ops import native_status

    device = select_device("auto")
    packages = ("torchvision", "segmentation-models-pytorch", "numpy")
    return {
        "dcnseg": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
        "device": str(device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "--amp auto": str(select_amp_dtype("auto", device) or "off").removeprefix("torch."),
        "native operators": dict(native_status()),
    }


def _describe_run(run: Path) -> dict[str, Any]:
    from dcnseg.checkpoint import find_weights, read_weights_info
    from dcnseg.config import to_dict

    weights = read_weights_info(find_weights(run))
    seen = weights.training_data
    return {
        "weights": str(weights.path),
        "dcnseg": weights.dcnseg_version,
        "model": to_dict(weights.model),
        "preprocessing": to_dict(weights.preprocessing),
        "classes": {str(entry.id): entry.name for entry in weights.class_map.classes},
        "scores": dict(weights.scores),
        "training data": None if seen is None else to_dict(seen),
    }


def _snake_case(name: str) -> str:
    return name.strip("-").replace(" ", "_").replace("-", "_")


def _lines(content: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in content.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {'unknown' if value is None else value}")
    return lines
