"""A comparison as a table; entry point `comparison_table`."""

from __future__ import annotations

import math

from rich.markup import escape
from rich.table import Table

from dcnseg.engine.compared_runs import Comparison
from dcnseg.report.comparison_report import summarize_variant
from dcnseg_cli.terminal_text import escape_line

SHOWN = ("mIoU", "lowest", "highest", "small", "medium", "large", "ms per image")


def comparison_table(comparison: Comparison) -> Table:
    """Build a table with a row for each variant."""
    table = Table(title=f"{comparison.split}: {comparison.num_images} images")
    table.add_column("variant", no_wrap=True)
    for column in SHOWN:
        table.add_column(column, justify="right")
    for variant in comparison.variants:
        row = summarize_variant(variant)
        name = escape(escape_line(variant.name))
        table.add_row(name, *(_describe(row[column]) for column in SHOWN))
    return table


def _describe(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) <= 1 else f"{value:.1f}"
