"""`dcnseg compare`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcnseg_cli.reporting import echo, message, report_errors
from dcnseg_cli.train import (
    AUTO,
    DEFAULT_PRESET,
    PresetOption,
    add_options,
    given_options,
    new_config,
)

if TYPE_CHECKING:
    from dcnseg.engine.compared_runs import Comparison

EPILOG = """
Examples:

  dcnseg compare photos --out comparison --preset small --seeds 3

  dcnseg compare photos --out comparison --variants plain,dilation2,dilation4,deformable --epochs 30

  dcnseg compare photos --out comparison --run plain=runs/plain --run deformable=runs/photos

  dcnseg compare --resume comparison
"""


@report_errors
@add_options(without=("modulated",))
def compare(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Argument(metavar="[DATA]", help="Data folder, as for train.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the comparison to write.")
    ] = None,
    variants: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Variants to train: plain, dilationN (plain, with a fixed dilation of N in the "
            "last three layers), deformable, deformable-v2. Default: these four, with twice the "
            "dilation of the plain network.",
        ),
    ] = "",
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of runs of each variant, with consecutive seeds.")
    ] = 1,
    run: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIANT=RUN",
            help="Compare this trained run instead of training the variant; repeatable.",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Resume this comparison.")] = None,
    preset: PresetOption = DEFAULT_PRESET,
    **settings: Any,
) -> None:
    """Train plain and deformable networks under the same conditions, and report the difference.

    All runs have the same images, order and schedule. The report gives the mIoU of each variant
    with its spread over seeds, the difference to the best fixed grid with a 95 % confidence
    interval, boundary IoU, IoU by object size, speed, and what the offsets contribute. The test
    images are evaluated once, at the end; without a test split, the validation images are.
    """
    from dcnseg.engine import comparison
    from dcnseg_cli.training_display import training_display

    given = given_options(context)
    folder = resume or out
    if resume is not None and given != {"resume"}:
        raise typer.BadParameter("no other option can be given.", param_hint="--resume")
    if folder is None or (resume is None and data is None):
        raise typer.BadParameter(
            "pass DATA and --out DIR, or --resume DIR.", param_hint="DATA / --out"
        )
    if settings["batch_size"] == AUTO:
        raise typer.BadParameter(
            "pass a number: all runs need the same.", param_hint="--batch-size"
        )
    with _suggest_resume(folder):
        if resume is not None:
            result = comparison.resume_comparison(
                folder, make_listener=training_display, on_run=message
            )
        else:
            config, sources = new_config(context.params, given)
            result = comparison.compare(
                config,
                folder,
                variants=[name.strip() for name in variants.split(",")] if variants else None,
                seeds=range(config.seed, config.seed + seeds),
                trained=_parse_runs(run or []),
                overwrite=settings["overwrite"],
                sources=sources,
                command=shlex.join(["dcnseg", *sys.argv[1:]]),
                make_listener=training_display,
                on_run=message,
            )
    _report(result, folder)


@contextmanager
def _suggest_resume(folder: Path) -> Iterator[None]:
    from dcnseg.engine.comparison import STATE

    try:
        yield
    except KeyboardInterrupt:
        if (folder / STATE).is_file():
            message(f"Resume with: dcnseg compare --resume {shlex.quote(str(folder))}")
        raise


def _parse_runs(texts: list[str]) -> dict[str, list[Path]]:
    """The trained runs of each variant, from texts like plain=runs/plain."""
    runs: dict[str, list[Path]] = {}
    for text in texts:
        name, is_pair, path = text.partition("=")
        if not (name and is_pair and path):
            raise typer.BadParameter(f"{text!r} is not VARIANT=RUN.", param_hint="--run")
        runs.setdefault(name, []).append(Path(path))
    return runs


def _report(comparison: Comparison, folder: Path) -> None:
    from dcnseg.report.comparison_report import REPORT, write_comparison
    from dcnseg_cli.comparison_table import comparison_table
    from dcnseg_cli.console import open_console

    write_comparison(comparison, folder)
    open_console().print(comparison_table(comparison))
    for sentence in comparison.sentences():
        echo(sentence)
    for name, reason in comparison.failed.items():
        message(f"Warning: {name} failed and is not compared: {reason}")
    message(f"Report: {folder / REPORT}")
