"""Options that several commands share, and the parsing of lists of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dcnseg.config import AMP_MODES, DEVICES
from dcnseg.errors import ConfigError

DATA_PANEL = "Data"
SPLITS = ("train", "val", "test", "all")


def choice_option(
    help_text: str, choices: Sequence[str], panel: str | None = None, *, metavar: str | None = None
) -> Any:
    """An option whose help shows the choices, and whose value the shell completes.

    The config checks the value, so that a wrong one gets the same message from Python.

    Args:
        help_text: What the option does.
        choices: What the shell proposes.
        panel: Its part of the help; None: the first one.
        metavar: Shown instead of the choices.
    """

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return typer.Option(
        help=help_text,
        metavar=metavar or f"[{'|'.join(choices)}]",
        autocompletion=complete,
        rich_help_panel=panel,
    )


def device_option(panel: str | None) -> Any:
    """The option --device in a part of the help."""
    return choice_option(
        "Where to compute; auto takes the first CUDA GPU, else mps, else the CPU.",
        DEVICES,
        panel,
        metavar="[auto|cpu|cuda|cuda:N|mps]",
    )


RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run folder (its best weights) or a weights file."),
]
DeviceOption = Annotated[str, device_option("Machine")]
AmpOption = Annotated[
    str,
    choice_option("Lower precision; auto is bf16 where it is faster.", AMP_MODES, "Machine"),
]
SplitOption = Annotated[str, choice_option("Images of this split.", SPLITS, "Data")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON for programs.", rich_help_panel="Output")
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Allow an output folder that is not empty.", rich_help_panel="Output"
    ),
]
WindowOption = Annotated[
    int,
    typer.Option(
        help="Side of the windows that larger images are cut into, in network pixels, from 64.",
        rich_help_panel="Inference",
    ),
]
OverlapOption = Annotated[
    float,
    typer.Option(
        help="Least overlap of windows, share of a side, 0..0.75.", rich_help_panel="Inference"
    ),
]
FlipOption = Annotated[
    bool,
    typer.Option("--flip", help="Average with the mirrored image.", rich_help_panel="Inference"),
]
ScalesOption = Annotated[
    str,
    typer.Option(
        help="Average over these scales, up to 8: 0.75,1,1.25.", rich_help_panel="Inference"
    ),
]
ImagesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGES...",
        help="Images, folders (with all below them), glob patterns, or - for a list on stdin.",
    ),
]
ImagesPatternOption = Annotated[
    str,
    typer.Option(
        "--images",
        help="Where the images are, with {stem} and maybe {split}: 'img/{split}/{stem}.jpg'. "
        "Relative to DATA; needed only where the layout is not recognized.",
        rich_help_panel=DATA_PANEL,
    ),
]
MasksPatternOption = Annotated[
    str,
    typer.Option(
        "--masks",
        help="Where their masks are: 'gt/{split}/{stem}_L.png'.",
        rich_help_panel=DATA_PANEL,
    ),
]
PairsOption = Annotated[
    Path | None,
    typer.Option(
        "--pairs",
        help="Instead of patterns, a list (CSV or text) of image, mask and maybe split per line.",
        rich_help_panel=DATA_PANEL,
    ),
]
IgnoreIndexOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-index",
        metavar="IDS",
        help="Mask values to ignore besides 255: 11 or 0,254; may be repeated.",
        rich_help_panel=DATA_PANEL,
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="Output folder.", rich_help_panel="Output")
]


def check_out_folder(out: Path, *, overwrite: bool) -> None:
    """Raise a ConfigError if `out` is a file, or a folder that is not empty."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder to write to.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"{out} is not empty. Choose another folder or add --overwrite.")


def parse_integers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers separated by commas; a usage error that names the option otherwise."""
    try:
        return tuple(map(int, text.split(","))) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers such as 1,2.", param_hint=option
        ) from None


def parse_ignore_index(values: Sequence[str] | None) -> tuple[int, ...]:
    """All values of an option that may be repeated and take lists, each value once."""
    return tuple(dict.fromkeys(parse_integers(",".join(values or ()), "--ignore-index")))


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas; a usage error that names the option otherwise."""
    try:
        return tuple(map(float, text.split(","))) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 0.5,2.", param_hint=option
        ) from None


def comma_list(values: Sequence[float | int | str]) -> str:
    """The text that the parsers above read."""
    return ",".join(str(value) for value in values)
