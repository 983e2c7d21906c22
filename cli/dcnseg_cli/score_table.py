"""Scores as a table; entry point `score_table`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from dcnseg_cli.terminal_text import escape_line

REGION_ROWS: Final = {
    "region AP": "ap",
    "region AP, IoU 0.5": "ap50",
    "the same, ranked by pixel confidence": "ap50_by_confidence",
    "region recall, IoU 0.5": "recall",
    "region accuracy": "accuracy",
    "region precision, IoU 0.5": "precision",
    "filtered by score, 95 % of the recall": "filtered_precision",
    "filtered by confidence, 95 % of the recall": "filtered_precision_by_confidence",
    "--min-region-score for 95 % of the recall": "filter_score",
}


def score_table(scores: Mapping[str, Any], title: str) -> Table:
    """Build a table of class IoU, mean IoU and pixel accuracy, as fractions.

    Args:
        scores: The result of `Scores.to_dict`.
        title: Title of the table.
    """
    table = Table(title=title, min_width=len(title))  # a longer title would be wrapped
    table.add_column("class")
    table.add_column("IoU", justify="right")
    for name, iou in scores["class_iou"].items():
        table.add_row(escape(escape_line(name)), describe_score(iou))
    table.add_section()
    table.add_row("mean IoU", describe_score(scores["mean_iou"]))
    if "unfiltered_mean_iou" in scores:
        table.add_row("mean IoU without the filter", describe_score(scores["unfiltered_mean_iou"]))
    table.add_row("pixel accuracy", describe_score(scores["pixel_accuracy"]))
    if regions := scores.get("regions"):
        table.add_section()
        for title, name in REGION_ROWS.items():
            table.add_row(title, describe_score(regions[name]))
    return table


def describe_score(value: float | None) -> str:
    """Format a score as 0.827, or as "absent" if the class does not occur."""
    return "absent" if value is None else f"{value:.3f}"
