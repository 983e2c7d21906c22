"""The Typer app: one command per file, each imported without torch."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dcnseg import __version__
from dcnseg.processes import this_process
from dcnseg_cli import (
    check,
    compare,
    demo,
    evaluate,
    export,
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

EXIT_CODES = (
    "Exit codes: 0 success; 1 failure; 2 usage error; 3 bad data, or some images failed; 129 "
    "terminal closed; 130 interrupted; 143 terminated. Results go to stdout, progress and messages "
    "to stderr. Set DCNSEG_DEBUG=1 to see the traceback of an unexpected error."
)

SHARED_COMMANDS = ("train", "evaluate")  # that several processes can share

app = typer.Typer(
    name="dcnseg",
    help="Semantic segmentation with deformable convolutions, for a folder of images and masks.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _add(name: str, command: Callable[..., None], epilog: str, **options: Any) -> None:
    """Add a command whose help is its docstring, without the line breaks within paragraphs."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    text = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    app.command(name, help=text, epilog=epilog, **options)(command)


_add("check", check.check, check.EPILOG)
_add("train", train.train, train.EPILOG, cls=train.TrainCommand)
_add("evaluate", evaluate.evaluate, evaluate.EPILOG)
_add("compare", compare.compare, compare.EPILOG, cls=train.TrainCommand)
_add("report", report.report, report.EPILOG)
_add("predict", predict.predict, predict.EPILOG)
_add("export", export.export, export.EPILOG)
_add("visualize-offsets", visualize_offsets.visualize_offsets, visualize_offsets.EPILOG)
_add("demo", demo.demo, demo.EPILOG)
_add("info", info.info, info.EPILOG)


def _print_version(value: bool) -> None:
    if value:
        echo(f"dcnseg {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Semantic segmentation with deformable convolutions, for a folder of images and masks."""
    process = this_process()
    if process.size > 1 and context.invoked_subcommand not in SHARED_COMMANDS:
        raise typer.BadParameter(
            f"{context.invoked_subcommand} cannot be shared by the {process.size} processes that "
            f"torchrun has started; only {' and '.join(SHARED_COMMANDS)} can. Start it without "
            "torchrun."
        )


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

        if this_process().is_main:
            rich_format_error(error)  # type: ignore[arg-type]
        return USAGE
