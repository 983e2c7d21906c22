"""`dcnseg check`."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcnseg.config import DataConfig
from dcnseg.errors import DataError
from dcnseg_cli.options import (
    DATA_PANEL,
    IgnoreIndexOption,
    ImagesPatternOption,
    JsonOption,
    MasksPatternOption,
    PairsOption,
    parse_ignore_index,
)
from dcnseg_cli.reporting import DATA, message, print_json, report_errors

if TYPE_CHECKING:
    from dcnseg.data.check.report import CheckReport

EPILOG = """
Examples:

  dcnseg check photos

  dcnseg check photos --mask-threshold 128 --write-classes --json

The exit code is 0 if training accepts the data (warnings are allowed), and 3 if not.
"""


@report_errors
def check(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Data folder, as for train.")],
    images: ImagesPatternOption = DataConfig.images,
    masks: MasksPatternOption = DataConfig.masks,
    pairs: PairsOption = DataConfig.pairs,
    val_fraction: Annotated[
        float,
        typer.Option(
            help="Fraction used for validation if DATA has no val split, between 0 and 1.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = DataConfig.val_fraction,
    ignore_index: IgnoreIndexOption = None,
    mask_threshold: Annotated[
        int,
        typer.Option(
            help="Treat mask values of at least this threshold as foreground; 0: masks contain "
            "class ids.",
            rich_help_panel=DATA_PANEL,
        ),
    ] = DataConfig.mask_threshold,
    workers: Annotated[
        int,
        typer.Option(help="Threads; 0: one per CPU.", rich_help_panel="Machine"),
    ] = 0,
    write_classes: Annotated[
        bool,
        typer.Option(
            "--write-classes",
            help="Write the suggested DATA/classes.json if there is no class list.",
            rich_help_panel="Output",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check every image and mask, report all problems, and suggest how to train."""
    config = DataConfig(
        data,
        images=images,
        masks=masks,
        pairs=pairs,
        val_fraction=val_fraction,
        ignore_index=parse_ignore_index(ignore_index),
        mask_threshold=mask_threshold,
        workers=workers,
    )
    try:
        report = _inspect(config)
    except DataError as error:  # nothing can be paired
        if not json:
            raise
        finding = {"severity": "error", "kind": "layout", "file": str(data), "what": str(error)}
        print_json({"root": str(data), "is_clean": False, "findings": [finding]})
        raise typer.Exit(DATA) from None
    if write_classes and _write_classes(report):
        report = _inspect(config)
    if json:
        print_json(report.to_dict())
    else:
        from dcnseg_cli.check_display import print_report

        print_report(report)
    if not report.is_clean:
        raise typer.Exit(DATA)


def _inspect(config: DataConfig) -> CheckReport:
    from dcnseg.data.check.report import check_data
    from dcnseg.data.pairing.folders import find_pairs
    from dcnseg_cli.progress_bar import progress_bar

    pairing = find_pairs(config.root, config.source, val_fraction=config.val_fraction)
    with progress_bar("Checking files") as on_progress:
        return check_data(
            config.root,
            pairing,
            ignore=config.ignore_index,
            mask_threshold=config.mask_threshold,
            workers=config.workers,
            on_progress=on_progress,
            layout_options=_layout_options(config),
        )


def _layout_options(config: DataConfig) -> list[str]:
    """Return the options that describe the layout, which train needs too."""
    options = ["--images", config.images, "--masks", config.masks] if config.images else []
    options += ["--pairs", str(config.pairs)] if config.pairs else []
    if config.val_fraction != DataConfig.val_fraction:
        options += ["--val-fraction", str(config.val_fraction)]
    return options


def _write_classes(report: CheckReport) -> bool:
    """Write the suggested class list if the data has none; return whether it was written."""
    from dcnseg.data.class_map import find_class_list
    from dcnseg.files import atomic_path

    present = find_class_list(report.root)
    if present is not None:
        message(f"{present} exists and is not changed.")
        return False
    if report.suggestion.classes is None:
        message("No classes can be suggested for these masks; classes.json is not written.")
        return False
    path = report.root / "classes.json"
    text = json_format.dumps(report.suggestion.classes, indent=1, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    message(f"Wrote {path}.")
    return True
