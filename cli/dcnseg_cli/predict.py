"""`dcnseg predict`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dcnseg.config import PredictConfig
from dcnseg_cli.options import (
    AmpOption,
    DeviceOption,
    FlipOption,
    ImagesArgument,
    JsonOption,
    OutOption,
    OverlapOption,
    OverwriteOption,
    RunArgument,
    ScalesOption,
    WindowOption,
    check_out_folder,
    comma_list,
    parse_numbers,
)
from dcnseg_cli.reporting import DATA, message, print_json, reports_errors

if TYPE_CHECKING:
    from dcnseg.inference.batch import FileResult

EPILOG = """
Examples:

  dcnseg predict runs/photos holiday/*.jpg --out predictions

  find . -name '*.png' | dcnseg predict runs/photos - --out predictions --save labels,probabilities
"""


@reports_errors
def predict(
    run: RunArgument,
    images: ImagesArgument,
    out: OutOption,
    save: Annotated[
        str,
        typer.Option(
            help="What to write: labels (PNG of class ids), overlay (JPEG), probabilities (npz).",
            rich_help_panel="Output",
        ),
    ] = "labels,overlay",
    overwrite: OverwriteOption = False,
    window: WindowOption = PredictConfig.window,
    overlap: OverlapOption = PredictConfig.overlap,
    flip: FlipOption = PredictConfig.flip,
    scales: ScalesOption = comma_list(PredictConfig.scales),
    device: DeviceOption = "auto",
    amp: AmpOption = "off",
    json: JsonOption = False,
) -> None:
    """Label every pixel of pictures of any size.

    Writes OUT/labels/NAME.png (palette PNG whose values are the class ids, at the picture's size)
    and OUT/overlays/NAME.jpg. A broken picture is named, the others go on, and the exit code is 3.
    """
    config = PredictConfig(window, overlap, flip, parse_numbers(scales, "--scales"))
    kinds = [kind.strip() for kind in save.split(",") if kind.strip()]
    check_out_folder(out, overwrite=overwrite)
    from dcnseg.inference.batch import predict_files
    from dcnseg.inference.inputs import find_inputs
    from dcnseg.inference.predictor import Predictor
    from dcnseg.inference.writers import check_output_kinds
    from dcnseg_cli.progress_bar import progress_bar

    check_output_kinds(kinds)
    inputs = find_inputs(images, sys.stdin)
    predictor = Predictor.from_checkpoint(run, device=device, amp=amp, config=config)
    done = 0
    with progress_bar("predicting") as on_progress:

        def on_result(result: FileResult) -> None:
            nonlocal done
            done += 1
            on_progress(done, len(inputs))
            _report(result, as_json=json)

        results = predict_files(predictor, inputs, out, kinds, on_result=on_result)
    failed = sum(result.error is not None for result in results)
    message(f"{len(results) - failed} of {len(results)} pictures labelled in {out}.")
    if failed:
        raise typer.Exit(DATA)


def _report(result: FileResult, *, as_json: bool) -> None:
    if result.error is not None:
        message(f"Error: {result.error}")
    if as_json:
        print_json(
            {
                "image": str(result.image.path),
                "outputs": {kind: str(path) for kind, path in result.outputs.items()},
                "class_shares": result.class_shares,
                "error": result.error,
            }
        )
    elif result.error is None and result.outputs:
        typer.echo(str(next(iter(result.outputs.values()))))
