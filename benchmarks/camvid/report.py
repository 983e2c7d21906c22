"""The results on CamVid as tables and curves.

Entry points: `to_markdown`, `curves_svg`, `fill_page`.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown_table

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Mean IoU on test, 11 classes, 480x360, nothing pretrained, as the papers have it.
PUBLISHED = (
    ("ENet (Paszke et al. 2016)", 51.3),
    ("FC-DenseNet103 (Jegou et al. 2017)", 66.9),
)
_COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")
_WIDTH, _HEIGHT, _MARGIN = 640, 360, 48

Run = Mapping[str, Any]


def to_markdown(runs: Sequence[Run]) -> str:
    """What was chosen on val, then the comparison on test, then classes and commands."""
    if not runs:
        return "Not yet run on a GPU."
    parts = []
    for phase, heading in (("recipes", "Recipes"), ("dilations", "Fixed dilations")):
        chosen = [run for run in runs if run["phase"] == phase]
        if chosen:
            parts.append(f"{heading}, chosen on val alone (one run each):")
            parts.append(_search_table(chosen))
    groups = _by_variant(run for run in runs if run["phase"] == "final")
    if groups:
        parts.append("Comparison (mean ± standard deviation over seeds):")
        parts.append(_comparison_table(groups))
        parts.append("IoU on test by class, augmented, in percent, mean over seeds:")
        parts.append(_class_table(groups))
        parts.append("Every run:")
        parts.append(_run_table([run for group in groups.values() for run in group]))
        parts.append("One run of each again:")
        commands = [shlex.join(line) for group in groups.values() for line in group[0]["commands"]]
        parts.append("\n".join(["```", *commands, "```"]))
    return "\n\n".join(parts)


def _by_variant(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, under a name that says what they are."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        name = run["variant"] + (f" {run['dilation']}" if run["dilation"] else "")
        groups.setdefault(f"{name}, {run['recipe']}, {run['epochs']} epochs", []).append(run)
    return groups


def _search_table(runs: Iterable[Run]) -> str:
    rows: list[tuple[object, ...]] = []
    for run in runs:
        val = run["val"]
        scores = (_percent(val["mean_iou"]), val["epoch"], run["seconds"])
        rows.append((run["recipe"], run["dilation"] or 2, run["epochs"], *scores))
    return markdown_table(("recipe", "dilation", "epochs", "val mIoU", "best epoch", "s"), rows)


def _comparison_table(groups: Mapping[str, Sequence[Run]]) -> str:
    columns: tuple[str, ...] = (
        "variant",
        "seeds",
        "val mIoU",
        "test mIoU",
        "test mIoU, augmented",
    )
    columns += ("pixel accuracy, augmented", "s per run")
    rows: list[tuple[object, ...]] = []
    for name, runs in groups.items():
        augmented = [run["test_augmented"] for run in runs]
        scores = (
            _mean(run["val"]["mean_iou"] for run in runs),
            _mean(run["test"]["mean_iou"] for run in runs),
            _mean(each["mean_iou"] for each in augmented),
            _mean(each["pixel_accuracy"] for each in augmented),
        )
        rows.append((name, len(runs), *scores, statistics.mean(run["seconds"] for run in runs)))
    rows += [(name, None, None, f"{score}", None, None, None) for name, score in PUBLISHED]
    return markdown_table(columns, rows)


def _class_table(groups: Mapping[str, Sequence[Run]]) -> str:
    first = next(iter(groups.values()))[0]
    rows: list[tuple[object, ...]] = []
    for name in first["test_augmented"]["class_iou"]:
        ious = [
            [run["test_augmented"]["class_iou"][name] for run in runs] for runs in groups.values()
        ]
        known = [[iou for iou in group if iou is not None] for group in ious]
        rows.append((name, *(f"{100 * statistics.mean(g):.1f}" if g else None for g in known)))
    return markdown_table(("class", *groups), rows)


def _run_table(runs: Iterable[Run]) -> str:
    rows = [
        (run["name"], run["val"]["epoch"], *(_percent(run[p]["mean_iou"]) for p in _PARTS))
        for run in runs
    ]
    return markdown_table(("run", "best epoch", "val", "test", "test, augmented"), rows)


_PARTS = ("val", "test", "test_augmented")


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f}"


def _mean(shares: Iterable[float | None]) -> str | None:
    known = [100 * share for share in shares if share is not None]
    if not known:
        return None
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.2f} ± {spread:.2f}"


def curves_svg(runs: Sequence[Run]) -> str:
    """Draw the mIoU on val over the epochs: a line for each run, a color for each variant."""
    groups = _by_variant(run for run in runs if run["phase"] == "final")
    epochs = max((run["epochs"] for run in runs), default=1)
    body = [_axes(epochs)]
    for number, (name, group) in enumerate(groups.items()):
        color = _COLORS[number % len(_COLORS)]
        for run in group:
            points = " ".join(
                f"{_x(record['epoch'], epochs):.1f},{_y(record['mean_iou']):.1f}"
                for record in run["metrics"]
                if record.get("mean_iou") is not None
            )
            body.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        place = f'x="{_MARGIN + 12}" y="{_MARGIN + 16 * number}"'
        body.append(f'<text {place} fill="{color}">{name}</text>')
    lines = "\n".join(body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n{lines}\n</svg>\n'
    )


def _axes(epochs: int) -> str:
    lines = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>']
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        lines.append(f'<path d="M{_MARGIN} {y:.1f}H{_WIDTH - _MARGIN}" stroke="#ddd"/>')
        lines.append(f'<text x="12" y="{y + 4:.1f}">{percent} %</text>')
    label = f'x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 16}" text-anchor="end"'
    lines.append(f"<text {label}>mIoU on val up to epoch {epochs}</text>")
    return "\n".join(lines)


def _x(epoch: float, epochs: int) -> float:
    return _MARGIN + (_WIDTH - 2 * _MARGIN) * epoch / epochs


def _y(share: float) -> float:
    return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * share


def fill_page(page: Path, text: str) -> None:
    """Put the text between the page's two marks, instead of what was there."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} lacks the marks {BEGIN} and {END}.")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
