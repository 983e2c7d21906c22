"""`dcnseg export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcnseg.config import EXPORT_INPUTS, EXPORT_OUTPUTS, EXPORT_SUFFIXES, ExportConfig
from dcnseg_cli.options import JsonOption, RunArgument, choice_option, comma_list
from dcnseg_cli.reporting import echo, message, print_json, report_errors

EPILOG = """
Examples:

  dcnseg export runs/photos --out model.onnx

  dcnseg export runs/photos --format openvino --out model.xml --output labels
"""


@report_errors
def export(
    run: RunArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="File to write: .onnx; .xml, with a .bin file beside it; or .pt2."
        ),
    ],
    format: Annotated[
        str,
        choice_option(
            "ONNX, OpenVINO IR, or a program of torch.export.", tuple(EXPORT_SUFFIXES), "--format"
        ),
    ] = ExportConfig.format,
    input: Annotated[
        str,
        choice_option(
            "Input of the model: RGB images [B, H, W, 3] as uint8, or resized by --input-scale and "
            "normalized, [B, 3, h, w] as float32.",
            EXPORT_INPUTS,
            "--input",
        ),
    ] = ExportConfig.input,
    output: Annotated[
        str,
        typer.Option(
            help=f"Outputs of the model, one or more of {', '.join(EXPORT_OUTPUTS)} in this order; "
            "predict and evaluate need logits. Labels are class ids."
        ),
    ] = comma_list(ExportConfig.outputs),
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images",
            help="Image to compare the results on; repeatable. [default: three validation images "
            "of the run, if they still exist]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write a trained network as a file that other programs run.

    The file has the preprocessing, the network and the choice of the classes, for any number and
    size of images; its metadata has the classes and their colors. Before it is written, its results
    are compared with those of the network on random and real images. If a logit differs by more
    than 0.001, or more than 0.01 % of the labels differ, no file is written.
    """
    from dcnseg.api import export_model

    result = export_model(
        run,
        out,
        format=format,
        input=input,
        outputs=[name.strip() for name in output.split(",") if name.strip()],
        images=images,
        overwrite=overwrite,
    )
    if result.has_region_head:
        message("Note: the region head is not exported; the model predicts pixels only.")
    message(f"Compared on {result.parity.sentence()}.")
    if json:
        print_json({"paths": [str(path) for path in result.paths], "parity": vars(result.parity)})
    else:
        for path in result.paths:
            echo(str(path))
