"""Options that several commands share, and the parsing of lists of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dcnseg.config import AMP_MODES, DEVICES
from dcnseg.errors import ConfigError
from dcnseg.inference.remote_files import AnyPath, has_content, has_unmarked_content

DATA_PANEL = "Data"
SPLITS = ("train", "val", "test", "all")


def choice_option(
    help_text: str,
    choices: Sequence[str],
    *names: str,
    panel: str | None = None,
    metavar: str | None = None,
) -> Any:
    """An option whose help shows the choices, and whose value the shell completes.

    The config validates the value, so Python and the command line report the same message.

    Args:
        help_text: What the option does.
        choices: Values that the shell completes.
        names: Names of the option; none: that of the parameter.
        panel: Panel of the help; None: the first one.
        metavar: Shown instead of the choices.
    """

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return typer.Option(
        *names,
        help=help_text,
        metavar=metavar or f"[{'|'.join(choices)}]",
        autocompletion=complete,
        rich_help_panel=panel,
    )


def device_option(panel: str | None) -> Any:
    """The option --device in a panel of the help."""
    return choice_option(
        "Device; auto picks the first CUDA GPU, then MPS, then the CPU.",
        DEVICES,
        panel=panel,
        metavar="[auto|cpu|cuda|cuda:N|mps]",
    )


RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run folder (its best weights are used) or weights file."),
]
ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run folder (its best weights are used), weights file, or ONNX model of `export`.",
    ),
]
DeviceOption = Annotated[str, device_option("Machine")]
AmpOption = Annotated[
    str,
    choice_option(
        "Mixed precision; auto uses bf16 where it is faster than float32.",
        AMP_MODES,
        panel="Machine",
    ),
]
SplitOption = Annotated[str, choice_option("Split to score.", SPLITS, panel="Data")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Allow a non-empty output folder.", rich_help_panel="Output"),
]
WindowOption = Annotated[
    int,
    typer.Option(
        help="Side of the sliding window in pixels after --input-scale, at least 64.",
        rich_help_panel="Inference",
    ),
]
MinRegionScoreOption = Annotated[
    float,
    typer.Option(
        help="Give regions with a score below this value (0 to 1) the most frequent class around "
        "them; needs a network with a region head.",
        rich_help_panel="Inference",
    ),
]
OverlapOption = Annotated[
    float,
    typer.Option(
        help="Minimum overlap of windows as a fraction of the side, 0 to 0.75.",
        rich_help_panel="Inference",
    ),
]
FlipOption = Annotated[
    bool,
    typer.Option(
        "--flip",
        help="Average with the prediction of the flipped image.",
        rich_help_panel="Inference",
    ),
]
ScalesOption = Annotated[
    str,
    typer.Option(
        help="Average over these scales, such as 0.75,1,1.25; each at most 8.",
        rich_help_panel="Inference",
    ),
]
ImagesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGES...",
        help="Images, folders (searched recursively), glob patterns, or - for a list on stdin.",
    ),
]
ImagesPatternOption = Annotated[
    str,
    typer.Option(
        "--images",
        help="Pattern of the image paths relative to DATA, with {stem} and optionally {split}: "
        "'img/{split}/{stem}.jpg'. Needed only if the layout is not recognized.",
        rich_help_panel=DATA_PANEL,
    ),
]
MasksPatternOption = Annotated[
    str,
    typer.Option(
        "--masks",
        help="Pattern of the mask paths: 'gt/{split}/{stem}_L.png'.",
        rich_help_panel=DATA_PANEL,
    ),
]
PairsOption = Annotated[
    Path | None,
    typer.Option(
        "--pairs",
        help="CSV or text file with an image, its mask and optionally the split per line, instead "
        "of patterns.",
        rich_help_panel=DATA_PANEL,
    ),
]
IgnoreIndexOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-index",
        metavar="IDS",
        help="Mask values to ignore in addition to 255, such as 11 or 0,254; repeatable.",
        rich_help_panel=DATA_PANEL,
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="Output folder.", rich_help_panel="Output")
]


def check_out_folder(out: AnyPath, *, overwrite: bool, accept_marked: bool = False) -> None:
    """Raise a ConfigError if `out` is a file or a folder that is not empty.

    With `accept_marked`, it may have files if it is marked as written by dcnseg.
    """
    if isinstance(out, Path) and out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder to write to.")
    is_filled = has_unmarked_content if accept_marked else has_content
    if not overwrite and is_filled(out):
        raise ConfigError(f"{out} is not empty. Choose another folder or add --overwrite.")


def parse_integers(text: str, option: str) -> tuple[int, ...]:
    """Parse whole numbers separated by commas; raises a usage error."""
    try:
        return tuple(map(int, text.split(","))) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of integers such as 1,2.", param_hint=option
        ) from None


def parse_ignore_index(values: Sequence[str] | None) -> tuple[int, ...]:
    """Parse the values of a repeatable option of lists, without duplicates."""
    return tuple(dict.fromkeys(parse_integers(",".join(values or ()), "--ignore-index")))


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Parse numbers separated by commas; raises a usage error."""
    try:
        return tuple(map(float, text.split(","))) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 0.5,2.", param_hint=option
        ) from None


def comma_list(values: Sequence[float | int | str]) -> str:
    """Format values as the parsers above read them."""
    return ",".join(str(value) for value in values)
