"""`dcnseg report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcnseg_cli.options import RunArgument
from dcnseg_cli.reporting import echo, report_errors

EPILOG = """
Examples:

  dcnseg report runs/photos

  dcnseg report runs/photos --out photos.html
"""


@report_errors
def report(
    run: RunArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file to write. [default: RUN/report.html]"),
    ] = None,
) -> None:
    """Write the report of a run as one HTML file, and draw its charts again.

    The report has the curves, the scores of each class, the confusion matrix, the best and worst
    images, the offsets, and how to repeat the run. It needs no other file and no network.
    """
    from dcnseg.report.run_report import write_run_charts, write_run_report

    path = write_run_report(run, out)
    write_run_charts(run)
    echo(str(path))
