"""Consoles for tables and progress that escape what they are given; the entry is `open_console`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from dcnseg_cli.reporting import mark_stdout_errors
from dcnseg_cli.terminal_text import escape_controls


class EscapingConsole(Console):
    """Escapes control characters where rich turns a string into styled text."""

    def print(self, *objects: Any, **style: Any) -> None:
        """Print; stdout that cannot take it is named, stderr that cannot is left alone."""
        with suppress(OSError) if self.stderr else mark_stdout_errors():
            super().print(*objects, **style)

    def render_str(self, text: str, **style: Any) -> Text:
        """Every string of a line, table or title comes through here."""
        return super().render_str(escape_controls(text), **style)


def open_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; names such as `:x:` stay what they are."""
    return EscapingConsole(stderr=stderr, emoji=False)
