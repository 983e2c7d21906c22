"""How commands speak: results on stdout, messages on stderr, errors as one line and a code."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import typer

from dcnseg.errors import ConfigError, DataError, DcnsegError

FAILURE, USAGE, DATA, INTERRUPTED, TERMINATED = 1, 2, 3, 130, 143
DEBUG_VARIABLE = "DCNSEG_DEBUG"


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come; handled as Ctrl-C is, but for the exit code."""


Command = TypeVar("Command", bound=Callable[..., Any])


def reports_errors(command: Command) -> Command:
    """Turn the exceptions of a command into one line on stderr and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except DcnsegError as error:
            fail(str(error), exit_code(error), error)
        except TerminatedError as error:
            fail("terminated", TERMINATED, error)
        except KeyboardInterrupt as error:
            fail("interrupted", INTERRUPTED, error)
        except BrokenPipeError:
            # The reader of stdout has gone (`| head`); nothing is left to be said to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILURE) from None
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            fail(f"{place}{error.strerror or error}", FAILURE, error)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if type(error).__module__.startswith(("typer", "click")):  # usage errors: Typer's own
                raise
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            fail(f"unexpected: {reason} ({DEBUG_VARIABLE}=1 shows the traceback)", FAILURE, error)

    return wrapper  # type: ignore[return-value]


def fail(text: str, code: int, error: BaseException) -> NoReturn:
    """Print an error line and leave; with DCNSEG_DEBUG set, raise the error itself."""
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        raise error
    message(f"Error: {text}")
    raise typer.Exit(code) from None


_received: list[int] = []
_postponing: list[bool] = []


def unwind_on_signals() -> None:
    """From now on let SIGTERM unwind the program as Ctrl-C does, so that nothing is left half."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _note_and_raise)


@contextmanager
def postponed_signals() -> Iterator[None]:
    """Within it, the first signal is noted only; `raise_if_signalled` acts on it afterwards.

    A second one raises at once, as outside.
    """
    _postponing.append(True)
    try:
        yield
    finally:
        _postponing.pop()


def is_signalled() -> bool:
    """Whether a signal that ends the program has come."""
    return bool(_received)


def raise_if_signalled() -> None:
    """Raise what a signal should have raised; Python drops it where a hook may not fail."""
    if _received:
        raise TerminatedError if _received[0] == signal.SIGTERM else KeyboardInterrupt


def _note_and_raise(number: int, _frame: object) -> None:
    _received.append(number)
    if not _postponing or len(_received) > 1:
        raise_if_signalled()


def exit_code(error: DcnsegError) -> int:
    """The exit code of an error that dcnseg raises on purpose."""
    if isinstance(error, ConfigError):
        return USAGE
    return DATA if isinstance(error, DataError) else FAILURE


def message(text: str) -> None:
    """Print a line on stderr."""
    typer.echo(text, err=True)


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object as one line on stdout."""
    typer.echo(json.dumps(content, ensure_ascii=False, allow_nan=False))
