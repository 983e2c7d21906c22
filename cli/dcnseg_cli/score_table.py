"""Scores as a table for people; the entry point is `score_table`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from dcnseg_cli.terminal_text import escape_line


def score_table(scores: Mapping[str, Any], title: str) -> Table:
    """The IoU of each class, their mean, and the pixel accuracy, as fractions.

    Args:
        scores: As `Scores.to_dict` gives them; None where a score has no meaning.
        title: Above the table.
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
    """A fraction such as 0.827, or that the class does not occur."""
    return "absent" if value is None else f"{value:.3f}"
