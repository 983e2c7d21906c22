"""The Typer app: one command per file, each imported without torch."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from dcnseg import __version__
from dcnseg_cli import (
    check,
    compare,
    demo,
    evaluate,
    info,
    predict,
    report,
    train,
    visualize_offsets,
)
from dcnseg_cli.allocator import keep_freed_memory
from dcnseg_cli.reporting import (
    USAGE,
    echo,
    escape_unencodable_text,
    exit_on_stdout_error,
    is_usage_error,
    message,
    raise_on_signals,
    show_warnings_as_messages,
    signal_exit_code,
)

EXIT_CODES = """
Exit codes: 0 success; 1 failure; 2 usage error; 3 bad data, or some images failed; 129 terminal
closed; 130 interrupted; 143 terminated. Results go to stdout, progress and messages to stderr. Set
DCNSEG_DEBUG=1 to see the traceback of an unexpected error.
"""

app = typer.Typer(
    name="dcnseg",
    help="Semantic segmentation with deformable convolutions, for a folder of images and masks.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("check", epilog=check.EPILOG)(check.check)
app.command("train", cls=train.TrainCommand, epilog=train.EPILOG)(train.train)
app.command("evaluate", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command("compare", cls=train.TrainCommand, epilog=compare.EPILOG)(compare.compare)
app.command("report", epilog=report.EPILOG)(report.report)
app.command("predict", epilog=predict.EPILOG)(predict.predict)
app.command("visualize-offsets", epilog=visualize_offsets.EPILOG)(
    visualize_offsets.visualize_offsets
)
app.command("demo", epilog=demo.EPILOG)(demo.demo)
app.command("info", epilog=info.EPILOG)(info.info)


def _print_version(value: bool) -> None:
    if value:
        echo(f"dcnseg {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Semantic segmentation with deformable convolutions, for a folder of images and masks."""


def main() -> None:
    """Run the command line."""
    # Errors about damaged files name the file; Pillow's warnings do not.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    show_warnings_as_messages()
    escape_unencodable_text()
    raise_on_signals()
    keep_freed_memory()
    sys.exit(_run())


def _run() -> int:
    """Run the command of the command line; returns the exit code."""
    try:
        return app(standalone_mode=False) or 0
    except KeyboardInterrupt as error:  # while the program starts; commands report their own
        message("Error: interrupted")
        return signal_exit_code(error)
    except OSError as error:  # help that stdout cannot take; commands report their own errors
        try:
            exit_on_stdout_error(error)
        except typer.Exit as exit_:
            return exit_.exit_code
    except Exception as error:
        if not is_usage_error(error):
            raise
        from typer.rich_utils import rich_format_error

        rich_format_error(error)  # type: ignore[arg-type]
        return USAGE
