"""`dcnseg visualize-offsets`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dcnseg_cli.options import (
    DeviceOption,
    ImagesArgument,
    OutOption,
    OverwriteOption,
    RunArgument,
    check_out_folder,
    parse_numbers,
)
from dcnseg_cli.reporting import DATA, echo, message, report_errors

EPILOG = """
Examples:

  dcnseg visualize-offsets runs/photos holiday/beach.jpg --out offsets

  dcnseg visualize-offsets runs/photos holiday --out offsets --point 320,200 --point 40,410

  dcnseg visualize-offsets runs/photos holiday --out offsets --regions car,bicycle

  dcnseg visualize-offsets runs/photos holiday --out explorer --html
"""


@report_errors
def visualize_offsets(
    run: RunArgument,
    images: ImagesArgument,
    out: OutOption,
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y",
            help="Pixel whose sampling positions are drawn; repeatable. Default: a small grid.",
            rich_help_panel="Drawing",
        ),
    ] = None,
    regions: Annotated[
        str,
        typer.Option(
            metavar="CLASS,...",
            help="Classes whose regions are drawn, for a network with a region head. Default: all.",
            rich_help_panel="Drawing",
        ),
    ] = "",
    html: Annotated[
        bool,
        typer.Option(
            "--html",
            help="Write a page to explore for each image instead of figures; points are pinned.",
            rich_help_panel="Drawing",
        ),
    ] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Visualize the learned offsets of a run.

    Draws the effective dilation and the offset field of each deformable layer and, for each point,
    the sampling positions of the last layer and of the last three layers in cascade, next to the
    regular grid. If the region head has offsets, draws the bins of the regions with the highest
    scores. A JSON file holds the same values.

    With --html, writes a page for each image, which opens in a browser without a network: move the
    pointer over the image to see the sampling positions from there.
    """
    points = [_parse_point(text) for text in point or []]
    classes = [name.strip() for name in regions.split(",")] if regions else []
    if html and classes:
        raise typer.BadParameter("The pages of --html show no regions.", param_hint="--regions")
    check_out_folder(out, overwrite=overwrite)
    from dcnseg.inference.inputs import find_inputs
    from dcnseg.visualize.explorer.run import explore_files
    from dcnseg.visualize.run import visualize_files

    inputs = find_inputs(images, sys.stdin, outputs=[out], on_note=message)
    if html:
        results = explore_files(run, inputs, out, points, device=device)
    else:
        results = visualize_files(
            run, inputs, out, points, region_classes=classes, device=device, on_note=message
        )
    failed = 0
    for result in results:
        if result.error is not None:
            failed += 1
            message(f"Error: {result.error}")
        for path in result.outputs:
            echo(str(path))
    message(f"Visualized {len(inputs) - failed} of {len(inputs)} images in {out}.")
    if failed:
        raise typer.Exit(DATA)


def _parse_point(text: str) -> tuple[float, float]:
    numbers = parse_numbers(text, "--point")
    if len(numbers) != 2:
        raise typer.BadParameter(f"{text!r} is not X,Y in pixels.", param_hint="--point")
    return numbers[0], numbers[1]
