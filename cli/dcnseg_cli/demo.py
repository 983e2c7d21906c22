"""`dcnseg demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcnseg_cli.options import DeviceOption, OverwriteOption, check_out_folder
from dcnseg_cli.reporting import echo, report_errors

EPILOG = """
Examples:

  dcnseg demo

  dcnseg demo somewhere/demo --seed 7 --overwrite
"""


@report_errors
def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Output folder.")] = Path(
        "dcnseg-demo"
    ),
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    overwrite: OverwriteOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Train, evaluate, predict and visualize offsets on generated scenes; takes a few minutes."""
    check_out_folder(folder, overwrite=overwrite)
    from dcnseg_cli.demo_steps import run_demo

    result = run_demo(folder, seed=seed, device=device)
    echo("")
    echo(f"mIoU {result.mean_iou:.3f} on the validation scenes.")
    echo("Of the sampling points of locations on beads, through three deformable layers,")
    for share, where in (
        (result.on_bead, "on the same bead"),
        (result.on_caps, "on its caps, which show the class"),
    ):
        echo(f"  {share.own:.1%} are {where}; {share.plain:.1%} with the plain grid.")
    echo("Open this first, to see where the network looks:")
    echo(f"  {folder / 'explorer/index.html'}")
    echo("Also written:")
    for what, path in (
        ("report of the training", "run/report.html"),
        ("scenes with their masks", "scenes/train"),
        ("scores of every class and image, and errors", "evaluation"),
        ("predictions", "predictions/overlays"),
        ("offset figures, a summary of each scene", "offsets"),
    ):
        echo(f"  {what + ':':<46}{folder / path}")
    echo("Next, with a folder of your own images and masks:")
    echo("  dcnseg check FOLDER")
