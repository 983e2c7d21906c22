"""A progress bar on stderr, on a terminal only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress

from dcnseg.processes import this_process
from dcnseg_cli.console import open_console


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, int], None]]:
    """Yield a function of (done, total) that advances the bar."""
    console = open_console(stderr=True)
    with Progress(
        console=console,
        disable=not console.is_terminal or not this_process().is_main,
        transient=True,
        redirect_stdout=False,  # programs read results from stdout
    ) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
