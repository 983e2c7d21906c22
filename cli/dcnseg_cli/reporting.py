"""Output of the commands: results on stdout, messages on stderr, errors as one line and a code."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, TypeVar

import typer

from dcnseg.errors import (
    ConfigError,
    DataError,
    DcnsegError,
    OtherProcessError,
    TrainingStoppedError,
)
from dcnseg.processes import this_process
from dcnseg_cli.terminal_text import (
    escape_controls,
    escape_line,
    escape_message,
    has_controls,
)

FAILURE, USAGE, DATA, HUNG_UP, INTERRUPTED, TERMINATED = 1, 2, 3, 129, 130, 143
DEBUG_VARIABLE = "DCNSEG_DEBUG"
STDOUT = "<stdout>"  # Python's name of the stream


class TerminatedError(KeyboardInterrupt):
    """SIGTERM was received; handled like Ctrl-C, with another exit code."""


class HungUpError(KeyboardInterrupt):
    """SIGHUP was received, for example because the terminal was closed; handled like Ctrl-C."""


Command = TypeVar("Command", bound=Callable[..., Any])


def report_errors(command: Command) -> Command:
    """Report exceptions of a command as one line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except DcnsegError as error:
            fail(str(error), exit_code(error), error)
        except KeyboardInterrupt as error:
            text = {TERMINATED: "terminated", HUNG_UP: "hung up", INTERRUPTED: "interrupted"}
            code = signal_exit_code(error)
            fail(text[code], code, error)
        except OSError as error:
            if error.filename == STDOUT:
                exit_on_stdout_error(error)
            place = f"{error.filename}: " if error.filename else ""
            fail(f"{place}{error.strerror or error}", FAILURE, error)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if is_usage_error(error):
                raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            fail(
                f"unexpected error: {reason} (set {DEBUG_VARIABLE}=1 for the traceback)",
                FAILURE,
                error,
            )

    return wrapper  # type: ignore[return-value]


def fail(text: str, code: int, error: BaseException) -> NoReturn:
    """Print an error line and exit; with DCNSEG_DEBUG set, raise the error itself."""
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        raise error
    if not _is_reported_elsewhere(error):
        process = this_process()
        prefix = f"[{process.describe()}] " if process.size > 1 else ""
        message(f"{prefix}Error: {text}")
    raise typer.Exit(code) from None


def _is_reported_elsewhere(error: BaseException) -> bool:
    """Whether another process that shares the run reports an error."""
    process = this_process()
    if process.is_main or isinstance(error, ConfigError):  # wrong for all of a machine
        return process.local_rank > 0
    return isinstance(error, OtherProcessError | TrainingStoppedError | KeyboardInterrupt)


def signal_exit_code(error: KeyboardInterrupt) -> int:
    """The exit code of a program that was ended by the signal behind an exception."""
    return {TerminatedError: TERMINATED, HungUpError: HUNG_UP}.get(type(error), INTERRUPTED)


@contextmanager
def mark_stdout_errors() -> Iterator[None]:
    """Set stdout as the file name of write errors raised inside."""
    try:
        yield
    except OSError as error:
        error.filename = STDOUT
        raise


def exit_on_stdout_error(error: OSError) -> NoReturn:
    """Exit because stdout cannot be written; silently if its reader has gone."""
    # What is still to be written must not fail once more when Python exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        raise typer.Exit(FAILURE) from None
    fail(f"cannot write to stdout: {error.strerror or error}", FAILURE, error)


def is_usage_error(error: Exception) -> bool:
    """Whether Typer reports this exception itself; escapes its text."""
    if not type(error).__module__.startswith(("typer", "click")):
        return False
    if isinstance(text := getattr(error, "message", None), str):
        error.message = escape_controls(text)  # type: ignore[attr-defined]
    return True


_EXCEPTIONS: dict[int, type[KeyboardInterrupt]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: TerminatedError,
}
if hasattr(signal, "SIGHUP"):  # not on Windows
    _EXCEPTIONS[signal.SIGHUP] = HungUpError
_received: list[int] = []
_postponing: list[bool] = []


def raise_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise an exception, as Ctrl-C does, so that files are cleaned up.

    SIGHUP stays ignored if it was, for example by nohup.
    """
    for number, exception in _EXCEPTIONS.items():
        if exception is HungUpError and signal.getsignal(number) == signal.SIG_IGN:
            continue
        signal.signal(number, _note_and_raise)


@contextmanager
def postponed_signals() -> Iterator[None]:
    """Only record the first signal inside; `raise_if_signalled` acts on it afterwards.

    A second signal raises immediately.
    """
    _postponing.append(True)
    try:
        yield
    finally:
        _postponing.pop()


def is_signalled() -> bool:
    """Whether a signal that ends the program was received."""
    return bool(_received)


def raise_if_signalled() -> None:
    """Raise the exception of a recorded signal."""
    if _received:
        raise _EXCEPTIONS[_received[0]]


def _note_and_raise(number: int, _frame: object) -> None:
    _received.append(number)
    if _EXCEPTIONS[number] is HungUpError:
        _leave_lost_terminal()
    if not _postponing or len(_received) > 1:
        raise_if_signalled()


def _leave_lost_terminal() -> None:
    """Redirect output to the null device if the terminal is gone, so that saving succeeds."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def exit_code(error: DcnsegError) -> int:
    """The exit code of a DcnsegError."""
    if isinstance(error, ConfigError):
        return USAGE
    return DATA if isinstance(error, DataError) else FAILURE


def message(text: str) -> None:
    """Print a message on stderr, with its control characters escaped."""
    with suppress(OSError):  # a full log must not end the run
        typer.echo(escape_message(text), err=True)


def echo(text: str) -> None:
    """Print a line of results on stdout, with its control characters escaped."""
    with mark_stdout_errors():
        typer.echo(escape_line(text))


def print_json(content: Mapping[str, Any]) -> None:
    """Print a JSON object as one line on stdout, in ASCII if stdout cannot encode the text."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    if has_controls(text) or not _can_encode(text):
        text = json.dumps(content, allow_nan=False)
    with mark_stdout_errors():
        typer.echo(text)


def _can_encode(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escape_unencodable_text() -> None:
    """Write characters that a stream cannot encode as escape sequences from now on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show_warnings_as_messages() -> None:
    """Print Python warnings as messages from now on."""

    def show(
        text: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        _file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        message(warnings.formatwarning(text, category, filename, lineno, line).rstrip("\n"))

    warnings.showwarning = show  # type: ignore[assignment]
