"""Scores as a table; entry point `score_table`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from dcnseg_cli.terminal_text import escape_line


def score_table(scores: Mapping[str, Any], title: str) -> Table:
    """Build a table of class IoU, mean IoU and pixel accuracy, as fractions.

    Args:
        scores: The result of `Scores.to_dict`.
        title: Title of the table.
    """
    table = Table(title=title)
    table.add_column("class")
    table.add_column("IoU", justify="right")
    for name, iou in scores["class_iou"].items():
        table.add_row(escape(escape_line(name)), describe_score(iou))
    table.add_section()
    table.add_row("mean IoU", describe_score(scores["mean_iou"]))
    table.add_row("pixel accuracy", describe_score(scores["pixel_accuracy"]))
    return table


def describe_score(value: float | None) -> str:
    """Format a score as 0.827, or as "absent" if the class does not occur."""
    return "absent" if value is None else f"{value:.3f}"
