"""Prints the report of a check as tables on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from dcnseg.data.check.findings import ERROR, WARNING, by_severity, format_findings
from dcnseg.data.check.report import CheckReport
from dcnseg_cli.console import open_console
from dcnseg_cli.terminal_text import escape_line

_MAX_NAMES = 5
_MAX_VALUES = 30


def print_report(report: CheckReport) -> None:
    """Print the contents of the data folder, its classes, the findings and the next command."""
    console = open_console()
    console.print(_overview(report))
    if report.classes:
        console.print(_class_table(report))
    elif report.values:
        console.print(_value_table(report))
    for severity in (ERROR, WARNING):
        findings = by_severity(report.findings, severity)
        if findings:
            console.print(f"\n[bold]{len(findings)} {severity}{'s' * (len(findings) != 1)}[/bold]")
            for line in format_findings(findings):
                console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    if not any(finding.kind == "no-masks" for finding in report.findings):
        _print_suggestion(console, report)


def _overview(report: CheckReport) -> Table:
    table = Table(title=escape(str(report.root)), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("layout", escape(report.layout))
    splits = ", ".join(f"{count} {name}" for name, count in report.splits.items() if count)
    table.add_row("pairs", splits or "none")
    for name, files in (
        ("images without a mask", report.images_without_mask),
        ("masks without an image", report.masks_without_image),
        ("other files", [file for file in report.other_files if file not in report.skipped]),
    ):
        if files:
            table.add_row(name, escape(_some(files)))
    for reason in dict.fromkeys(report.skipped.values()):
        files = [file for file, why in report.skipped.items() if why == reason]
        table.add_row("skipped", escape(f"{_some(files)} ({reason})"))
    table.add_row("sizes", _counts(report.sizes))
    table.add_row("images", _counts(report.image_modes))
    table.add_row("masks", _counts(report.mask_modes))
    return table


def _some(files: Sequence[str]) -> str:
    rest = f", ... {len(files) - _MAX_NAMES} more" if len(files) > _MAX_NAMES else ""
    return f"{len(files)}: {', '.join(files[:_MAX_NAMES])}{rest}"


def _counts(counts: Mapping[str, int]) -> str:
    parts = [f"{name} ({count})" for name, count in list(counts.items())[:_MAX_NAMES]]
    rest = len(counts) - _MAX_NAMES
    return escape("; ".join(parts) + (f"; {rest} others" if rest > 0 else ""))


def _class_table(report: CheckReport) -> Table:
    table = _counting_table("id", "class")
    pixels = max(1, sum(entry.pixels for entry in report.classes) + report.ignored_pixels)
    images = max(1, sum(report.splits.values()))
    for entry in report.classes:
        table.add_row(
            str(entry.id),
            escape(entry.name),
            _share(entry.pixels, pixels),
            _share(entry.images, images),
        )
    if report.ignored_pixels:
        table.add_row("", "(ignored)", _share(report.ignored_pixels, pixels), "")
    return table


def _value_table(report: CheckReport) -> Table:
    table = _counting_table("value")
    pixels = max(1, sum(entry.pixels for entry in report.values))
    images = max(1, sum(report.splits.values()))
    for entry in report.values[:_MAX_VALUES]:
        table.add_row(str(entry.value), _share(entry.pixels, pixels), _share(entry.images, images))
    if len(report.values) > _MAX_VALUES:
        table.add_row(f"and at least {len(report.values) - _MAX_VALUES} others", "", "")
    return table


def _counting_table(*names: str) -> Table:
    table = Table()
    for name in names:
        table.add_column(name)
    for name in ("fraction of pixels", "fraction of images"):
        table.add_column(name, justify="right")
    return table


def _share(part: int, whole: int) -> str:
    share = part / whole
    return f"{share:.4f}" if share >= 0.0001 or not part else "< 0.0001"


def escape(text: str) -> str:
    """Escape what rich or the terminal would interpret."""
    return escape_markup(escape_line(text))


def _print_suggestion(console: Console, report: CheckReport) -> None:
    suggestion = report.suggestion
    if suggestion.classes is not None:
        console.print("\nSuggested classes.json (write it with --write-classes):")
        text = json.dumps(suggestion.classes, ensure_ascii=False)
        console.print(escape(text), highlight=False, soft_wrap=True)
    verb = "Next step" if report.is_clean else "Next step, once the errors are fixed"
    console.print(f"\n{verb}:")
    console.print(escape(suggestion.command), highlight=False, soft_wrap=True)
