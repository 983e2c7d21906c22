"""`dcnseg visualize-offsets`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dcnseg.config import GRADIENT_PIXELS
from dcnseg_cli.options import (
    SPLITS,
    DeviceOption,
    ImagesArgument,
    OutOption,
    OverwriteOption,
    RunArgument,
    check_out_folder,
    choice_option,
    parse_numbers,
)
from dcnseg_cli.reporting import DATA, echo, message, report_errors

FORMATS = ("png", "svg", "both")
EPILOG = """
Examples:

  dcnseg visualize-offsets runs/photos holiday/beach.jpg --out offsets

  dcnseg visualize-offsets runs/photos holiday --out offsets --point 320,200 --point 40,410

  dcnseg visualize-offsets runs/photos holiday --out offsets --compare runs/plain --format svg

  dcnseg visualize-offsets runs/photos holiday --out offsets --regions car,bicycle

  dcnseg visualize-offsets runs/photos holiday --out explorer --html

  dcnseg visualize-offsets runs/photos photos --table --split test --out measures
"""

MEASURES_PANEL = "Measures"


@report_errors
def visualize_offsets(
    run: RunArgument,
    images: ImagesArgument,
    out: OutOption,
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y",
            help="Pixel whose sampling points are drawn; repeatable. Default: the middle of the "
            "background, of a small and of a large object of the prediction.",
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
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN2",
            help="Run or weights file to draw side by side, with the same points and scales.",
            rich_help_panel="Drawing",
        ),
    ] = None,
    figure_format: Annotated[
        str, choice_option("File format of the figures.", FORMATS, "--format", panel="Drawing")
    ] = "png",
    animate: Annotated[
        bool,
        typer.Option(
            "--animate",
            help="Also write an animated WebP of a point that moves over the image.",
            rich_help_panel="Drawing",
        ),
    ] = False,
    frames: Annotated[
        int,
        typer.Option(help="Number of frames of --animate, 1 to 600.", rich_help_panel="Drawing"),
    ] = 48,
    html: Annotated[
        bool,
        typer.Option(
            "--html",
            help="Write a page to explore for each image instead of figures; points are pinned.",
            rich_help_panel="Drawing",
        ),
    ] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table",
            help="Measure the offsets over one data folder instead of drawing them. Without masks, "
            "the predicted label maps tell the objects.",
            rich_help_panel=MEASURES_PANEL,
        ),
    ] = False,
    split: Annotated[str, choice_option("Split to measure.", SPLITS, panel=MEASURES_PANEL)] = "val",
    gradient_pixels: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of random pixels of each class whose effective receptive field is "
            "measured; 0 for none.",
            rich_help_panel=MEASURES_PANEL,
        ),
    ] = GRADIENT_PIXELS,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Visualize the learned offsets of a run.

    For each image, writes a summary NAME.png, and a folder NAME: the effective dilation and the
    flow of the offsets of each deformable layer and, for each point, the sampling points of the
    last layer and of the last three layers in cascade, next to the plain grid. If the region head
    has offsets, draws the bins of the regions with the highest scores. NAME/offsets.json holds the
    same values.

    With --html, writes a page for each image, which opens in a browser without a network: move the
    pointer over the image to see the sampling points from there. If an image belongs to the
    data folder of the run or to a data folder in IMAGES, its page shows the ground truth, too.

    With --table, writes the measures of the offsets over a data folder instead: effective dilation,
    share of the sampling points on the object of their center, effective receptive field.
    """
    if table:
        if point or regions or compare or animate or html:
            raise typer.BadParameter(
                "it draws nothing; remove --point, --regions, --compare, --animate and --html.",
                param_hint="--table",
            )
        if len(images) != 1:
            raise typer.BadParameter("pass one data folder.", param_hint="--table")
        check_out_folder(out, overwrite=overwrite)
        _measure(run, Path(images[0]), split, out, gradient_pixels, device)
        return
    if animate and frames < 1:
        raise typer.BadParameter(f"--frames is {frames}; expected 1 to 600.")
    points = [_parse_point(text) for text in point or []]
    classes = [name.strip() for name in regions.split(",")] if regions else []
    if html and (classes or compare or animate):
        raise typer.BadParameter(
            "its pages show no regions, second network or animation; remove --regions, --compare "
            "and --animate.",
            param_hint="--html",
        )
    check_out_folder(out, overwrite=overwrite)
    from dcnseg.engine.evaluation import find_masks
    from dcnseg.inference.inputs import find_inputs
    from dcnseg.visualize.explorer.run import explore_files
    from dcnseg.visualize.run import visualize_files

    inputs = find_inputs(images, sys.stdin, outputs=[out], on_note=message)
    if html:
        masks = find_masks(run, inputs, images)
        results = explore_files(
            run, inputs, out, points, masks=masks, device=device, on_note=message
        )
    else:
        results = visualize_files(
            run,
            inputs,
            out,
            points,
            compare=compare,
            region_classes=classes,
            figure_format=figure_format,
            frames=frames if animate else 0,
            device=device,
            on_note=message,
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


def _measure(
    run: Path, data: Path, split: str, out: Path, gradient_pixels: int, device: str
) -> None:
    from dcnseg.engine.evaluation import check_classes, find_measured_images
    from dcnseg.files import mark_output_folder
    from dcnseg.inference.predictor import Predictor
    from dcnseg.report.measures_report import write_measures
    from dcnseg.visualize.measures.measuring import measure_offsets
    from dcnseg.visualize.measures.results import PREDICTIONS
    from dcnseg_cli.console import open_console
    from dcnseg_cli.measures_table import describe_problems, measures_tables
    from dcnseg_cli.progress_bar import progress_bar

    images = find_measured_images(run, data, split, out=out)
    predictor = Predictor.from_checkpoint(run, device=device)
    check_classes(data, predictor.class_map)
    with progress_bar("Measuring") as on_progress:
        measures = measure_offsets(
            predictor, images, pixels_per_class=gradient_pixels, on_progress=on_progress
        )
    if measures.labels == PREDICTIONS:
        message(f"{data} has no masks: the predicted label maps of all images tell the objects.")
    mark_output_folder(out)
    for path in write_measures(out, measures):
        message(str(path))
    console = open_console()
    for found in measures_tables(measures):
        console.print(found)
    for problem in describe_problems(measures):
        echo(problem)


def _parse_point(text: str) -> tuple[float, float]:
    numbers = parse_numbers(text, "--point")
    if len(numbers) != 2:
        raise typer.BadParameter(f"{text!r} is not X,Y in pixels.", param_hint="--point")
    return numbers[0], numbers[1]
