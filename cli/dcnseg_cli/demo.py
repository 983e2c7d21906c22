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
    """Train, evaluate, predict and visualize offsets on generated scenes; takes about 3 minutes."""
    check_out_folder(folder, overwrite=overwrite)
    from dcnseg_cli.demo_steps import run_demo

    run_demo(folder, seed=seed, device=device)
    echo("")
    echo("Results:")
    for what, path in (
        ("scenes with their masks", "scenes/train"),
        ("validation images, masks and predictions", "run/preview.jpg"),
        ("scores and offsets of every epoch", "run/metrics.jsonl"),
        ("predictions", "predictions/overlays"),
        ("offset figures", "offsets"),
    ):
        echo(f"  {what + ':':<45}{folder / path}")
