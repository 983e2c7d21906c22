"""Charts of a run and of its scores, drawn with Matplotlib.

The functions `draw_*` return figures; `save_chart`, `chart_to_svg` and `chart_to_rgb` write them.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dcnseg.data.class_map import ClassMap
from dcnseg.files import atomic_path
from dcnseg.scoring.bootstrap import Interval
from dcnseg.scoring.region_scores import FilterCurve

Rgb01 = tuple[float, float, float]

INK: Final = "#1c1e24"
GRID: Final = "#8a8f99"
# Okabe & Ito 2008: eight colors that color-blind people can tell apart; black and yellow left out.
PALETTE: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
LUMINANCE: Final = (0.4, 0.72)  # of lines, to be seen on a light and on a dark page
MAX_CELL_CLASSES: Final = 20  # a confusion matrix with more has no numbers in its cells
LEAST_CELL: Final = 0.005  # fraction of a confusion matrix's row that is written into its cell
DPI: Final = 144
PNG_LEVEL: Final = 3  # three times as fast as the default
SVG_DPI: Final = 200  # of images in an SVG
STYLE: Final[Any] = {  # names of Matplotlib's settings
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.alpha": 0.3,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dcnseg",
    "text.color": INK,
    "text.parse_math": False,  # class names may have a $
    "xtick.color": INK,
    "ytick.color": INK,
}


@matplotlib.rc_context(STYLE)
def draw_training_curves(records: Sequence[Mapping[str, Any]], class_map: ClassMap) -> Figure:
    """Draw loss, learning rate, mIoU, class IoU and offset lengths over the epochs.

    Args:
        records: The epochs, as in metrics.jsonl.
        class_map: The classes, for their colors.
    """
    panels: list[tuple[str, Callable[[Axes], Any]]] = [
        ("Training loss", lambda axes: _plot(axes, records, ["loss"], PALETTE[0])),
        ("Learning rate", lambda axes: _plot(axes, records, ["lr"], PALETTE[2])),
        ("Validation mIoU and pixel accuracy", lambda axes: _plot_scores(axes, records)),
    ]
    if any(record.get("offsets") for record in records):
        panels.append(("Mean offset length", lambda axes: _plot_offsets(axes, records)))
    # Last, because its legend takes the place of the next panel.
    panels.append(
        ("Validation IoU per class", lambda axes: _plot_classes(axes, records, class_map))
    )
    figure, grid = _make_figure((12.6, 5.8), 2, 3)
    for axes, (title, draw) in zip(grid, panels, strict=False):
        axes.set_title(title, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        draw(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure


@matplotlib.rc_context(STYLE)
def draw_confusion(
    confusion: npt.NDArray[np.int64], names: Sequence[str], *, is_normalized: bool = True
) -> Figure:
    """Draw a confusion matrix [K, K]: rows are true classes, as fractions of each or as counts."""
    totals = confusion.sum(1, keepdims=True)
    fractions = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    side = float(np.clip(1.6 + 0.52 * len(names), 4.0, 16.0))
    figure, (axes,) = _make_figure((side + 1.0, side), 1, 1)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    drawn = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="fraction of the true class")
    ticks = range(len(names))
    axes.set_xticks(ticks, [shorten(name) for name in names], rotation=45, ha="right")
    axes.set_yticks(ticks, [shorten(name) for name in names])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"Confusion matrix ({'rows add up to 1' if is_normalized else 'pixels'})")
    for row, column in np.ndindex(*confusion.shape) if len(names) <= MAX_CELL_CLASSES else ():
        count, share = int(confusion[row, column]), fractions[row, column]
        text = f"{share:.2f}" if is_normalized else _short_count(count)
        if share >= LEAST_CELL:
            ink = "white" if share > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=7.5)
    return figure


@matplotlib.rc_context(STYLE)
def draw_class_balance(pixel_counts: npt.NDArray[np.int64], class_map: ClassMap) -> Figure:
    """Draw the fraction of the labeled training pixels of each class, [K]."""
    shares = pixel_counts / max(1, pixel_counts.sum())
    figure, axes = _make_bars(class_map.names, 1)
    bars = axes.barh(range(len(shares)), shares, color=_class_colors(class_map))
    axes.bar_label(bars, [f"{share:.3g}" for share in shares], padding=3, fontsize=8)
    axes.set_xlim(0, 1.15 * shares.max(initial=0.01))
    axes.set_xlabel("fraction of the labeled training pixels")
    axes.set_title("Class balance", loc="left")
    return figure


@matplotlib.rc_context(STYLE)
def draw_class_scores(
    scores: Mapping[str, npt.NDArray[np.float64]], names: Sequence[str]
) -> Figure:
    """Draw bars of several scores per class; the scores [K] by their names, such as "IoU"."""
    figure, axes = _make_bars(names, len(scores))
    height = 0.8 / len(scores)
    for i, (name, values) in enumerate(scores.items()):
        places = np.arange(len(names)) + (i - (len(scores) - 1) / 2) * height
        axes.barh(places, np.nan_to_num(values), height, label=name, color=PALETTE[i])
    axes.set_xlim(0, 1)
    axes.set_title("Scores per class", loc="left")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.02), ncols=len(scores))
    return figure


@matplotlib.rc_context(STYLE)
def draw_region_filters(curves: Mapping[str, FilterCurve]) -> Figure:
    """Draw precision over recall of the regions that filters keep, by the name of each filter."""
    figure, (axes,) = _make_figure((5.6, 4.4), 1, 1)
    for (name, curve), color in zip(curves.items(), PALETTE, strict=False):
        axes.plot(curve.recall, curve.precision, color=color, label=name)
    if all_regions := [(c.recall[-1], c.precision[-1]) for c in curves.values() if c.recall.size]:
        axes.plot(*all_regions[0], "o", color=INK, label="all regions")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title("Regions kept by a filter, IoU 0.5", loc="left")
    axes.legend(loc="lower left")
    return figure


@matplotlib.rc_context(STYLE)
def draw_comparison(
    mean_ious: Mapping[str, Sequence[float]],
    by_size: Mapping[str, Mapping[str, float]],
    differences: Mapping[str, Interval],
) -> Figure:
    """Draw the mean IoU of variants, their IoU by object size, and their differences.

    Args:
        mean_ious: Mean IoU of each run, by variant.
        by_size: Mean IoU of the objects of each size, by variant.
        differences: Differences in mean IoU with their confidence intervals, by label.
    """
    figure, (scores, sizes, forest) = _make_figure((13.5, 1.6 + 0.5 * len(mean_ious)), 1, 3)
    for i, (name, values) in enumerate(mean_ious.items()):
        average = float(np.mean(values))
        color = PALETTE[i % len(PALETTE)]
        scores.plot([average] * 2, [i - 0.3, i + 0.3], color=color, linewidth=2.5)
        scores.plot(values, [i] * len(values), "o", color=color, alpha=0.7, markersize=6)
        scores.annotate(
            f"{average:.3f}",
            (average, i - 0.3),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
        sizes.plot(list(by_size[name]), list(by_size[name].values()), "o-", color=color, label=name)
    _name_rows(scores, list(mean_ious))
    scores.set_title("mIoU of each run, and mean", loc="left")
    sizes.set_title("IoU by object size", loc="left")
    sizes.legend(loc="best", fontsize=8)
    for i, interval in enumerate(differences.values()):
        forest.plot([interval.low, interval.high], [i, i], "|-", color=PALETTE[0], markersize=9)
        forest.plot(interval.difference, i, "o", color=PALETTE[0])
    forest.axvline(0, color=GRID, linewidth=1)
    _name_rows(forest, list(differences))
    forest.set_title("Difference in mIoU, 95 % interval", loc="left")
    return figure


@matplotlib.rc_context(STYLE)
def draw_offset_measures(
    dilation: Mapping[str, Mapping[str, tuple[float, float]]],
    on_object: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Draw the effective dilation by object size, and the share of sampling points on objects.

    Args:
        dilation: Mean and deviation relative to the plain grid by size, by layer.
        on_object: Share of the "own", "plain" and "shuffled" points, by layer.
    """
    figure, (sizes, points) = _make_figure((11.0, max(3.6, 1.4 + 0.5 * len(on_object))), 1, 2)
    for i, (layer, by_size) in enumerate(dilation.items()):
        values = np.array(list(by_size.values()))
        places = np.arange(len(by_size)) + 0.08 * (i - (len(dilation) - 1) / 2)
        sizes.errorbar(
            *(places, values[:, 0], values[:, 1]),
            fmt="o",
            capsize=3,
            color=PALETTE[i % len(PALETTE)],
            label=layer.removeprefix("encoder."),
        )
        sizes.set_xticks(range(len(by_size)), list(by_size))
    sizes.axhline(1, color=INK, linewidth=1, label="plain")
    low, high = sizes.get_ylim()
    sizes.set_ylim(min(low, 0.75), max(high, 1.25))  # small differences must look small
    sizes.set_title("Effective dilation / that of the plain grid", loc="left")
    sizes.legend(loc="best", fontsize=7.5)
    for i, shares in enumerate(on_object.values()):
        for kind, marker, color in (
            ("plain", "|", INK),
            ("shuffled", "x", PALETTE[1]),
            ("own", "o", PALETTE[0]),
        ):
            label = kind if i == 0 else None
            points.plot(shares[kind], i, marker, color=color, markersize=9, label=label)
    _name_rows(points, [layer.removeprefix("encoder.") for layer in on_object])
    points.set_xlim(0, 1)
    points.set_title("Share of points on the object of their center", loc="left")
    points.legend(loc="lower center", bbox_to_anchor=(0.5, -0.25), ncols=3)
    return figure


@matplotlib.rc_context(STYLE)
def save_chart(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, by the suffix of the path; the file appears whole."""
    with atomic_path(path, is_durable=False) as temporary:
        if path.suffix == ".svg":
            _save(figure, temporary, dpi=SVG_DPI, metadata={"Date": None})
        else:
            _save(figure, temporary, dpi=DPI, pil_kwargs={"compress_level": PNG_LEVEL})


@matplotlib.rc_context(STYLE)
def chart_to_rgb(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return a figure as an RGB image, uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    _save(figure, buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
    return np.asarray(Image.open(buffer).convert("RGB"))


@matplotlib.rc_context(STYLE)
def chart_to_svg(figure: Figure, label: str) -> str:
    """Return a figure as an SVG element for HTML, in the page's text color and without background.

    Args:
        figure: A figure of one of the functions `draw_*`.
        label: What the chart shows, for screen readers.
    """
    buffer = io.StringIO()
    _save(figure, buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    described = f'<svg role="img" aria-label="{_escape(label)}"'
    return svg.replace("<svg", described, 1)


def _save(figure: Figure, target: Path | io.StringIO | io.BytesIO, **options: Any) -> None:
    """Save a figure; a name in a script that the font lacks becomes boxes in a PNG."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(target, **options)


def _plot(
    axes: Axes,
    records: Sequence[Mapping[str, Any]],
    path: Sequence[str],
    color: str | Rgb01,
    label: str | None = None,
) -> list[tuple[int, float]]:
    """Plot the value under nested keys over the epochs that have it, and return the points."""
    points = []
    for record in records:
        value: Any = record
        for key in path:
            value = (value or {}).get(key)
        if value is not None:
            points.append((record["epoch"], float(value)))
    epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
    axes.plot(epochs, values, color=color, marker=_marker(values), label=label)
    axes.autoscale(axis="y")  # setting a limit, as for an earlier line, ends it
    axes.set_ylim(bottom=0)
    return points


def _plot_scores(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    points = _plot(axes, records, ["mean_iou"], PALETTE[0], "mIoU")
    _plot(axes, records, ["pixel_accuracy"], PALETTE[1], "pixel accuracy")
    if points:
        best = max(points, key=lambda point: point[1])
        axes.annotate(f"{best[1]:.3f}", best, (0, 6), textcoords="offset points", ha="center")
    axes.set_ylim(0, 1.05)
    axes.legend(loc="lower right")


def _plot_classes(axes: Axes, records: Sequence[Mapping[str, Any]], class_map: ClassMap) -> None:
    has_legend = class_map.num_classes <= MAX_CELL_CLASSES
    for name, color in zip(class_map.names, _class_colors(class_map), strict=True):
        label = shorten(name) if has_legend else None
        _plot(axes, records, ["class_iou", name], color, label)
    axes.set_ylim(0, 1.05)
    if has_legend:
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), labelspacing=0.3)
        legend.set_in_layout(False)


def _plot_offsets(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    layers = dict.fromkeys(name for record in records for name in record.get("offsets", {}))
    for i, layer in enumerate(layers):
        color, label = PALETTE[i % len(PALETTE)], layer.removeprefix("encoder.")
        _plot(axes, records, ["offsets", layer, "mean_px"], color, label)
    axes.set_ylabel("pixels of the feature map")
    axes.legend(loc="best", fontsize=7.5)


def _marker(values: Sequence[float]) -> str:
    return "o" if len(values) == 1 else ""


def _make_figure(size: tuple[float, float], rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _make_bars(names: Sequence[str], bars_per_class: int) -> tuple[Figure, Axes]:
    """A figure for horizontal bars, the first class on top."""
    height = 1.2 + len(names) * (0.12 + 0.14 * bars_per_class)
    figure, (axes,) = _make_figure((6.4, min(height, 40.0)), 1, 1)
    _name_rows(axes, [shorten(name) for name in names])
    return figure, axes


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a chart, the first on top."""
    axes.set_yticks(range(len(names)), [shorten(name, 40) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.grid(axis="y", visible=False)


def _class_colors(class_map: ClassMap) -> list[Rgb01]:
    return [_visible(color) for color in class_map.index_colors()[: class_map.num_classes] / 255.0]


def _visible(rgb: npt.NDArray[np.float64]) -> Rgb01:
    """Mix a color with black or white until it can be seen on a light and on a dark page."""
    low, high = LUMINANCE
    luminance = float(rgb @ (0.299, 0.587, 0.114))
    if luminance > high:
        rgb = rgb * (high / luminance)
    elif luminance < low:
        rgb = 1 - (1 - rgb) * ((1 - low) / (1 - luminance))
    return float(rgb[0]), float(rgb[1]), float(rgb[2])


def shorten(name: str, limit: int = 18) -> str:
    """Return a name as Matplotlib draws it, with at most `limit` characters."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    text = f" {text}" if text.startswith("_") else text  # Matplotlib hides such labels
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _short_count(count: int) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{suffix}"
    return str(count)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
