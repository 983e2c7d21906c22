"""A rich console that escapes control characters; entry point `open_console`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from dcnseg_cli.reporting import mark_stdout_errors
from dcnseg_cli.terminal_text import escape_controls


class EscapingConsole(Console):
    """Escapes control characters in every string that it prints."""

    def print(self, *objects: Any, **style: Any) -> None:
        """Print; write errors of stdout are reported, those of stderr are ignored."""
        with suppress(OSError) if self.stderr else mark_stdout_errors():
            super().print(*objects, **style)

    def render_str(self, text: str, **style: Any) -> Text:
        """Escape a string; rich calls this for every line, cell and title."""
        return super().render_str(escape_controls(text), **style)


def open_console(*, stderr: bool = False) -> Console:
    """Open a console on stdout or stderr that does not replace emoji codes such as `:x:`."""
    return EscapingConsole(stderr=stderr, emoji=False)
