"""Time the operators and a training step on a GPU, with dense and torchvision's beside them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_ops import DENSE, TORCHVISION
from benchmarks.bench_roi import make_comparisons
from benchmarks.common import OURS, describe_gpu, markdown_table
from benchmarks.gpu_convolutions import DTYPES, Bench, bench_convolutions
from benchmarks.gpu_timing import GpuClock, measure_ceilings
from benchmarks.gpu_training import Batch, time_steps

# Encoder, and `torch.backends.cudnn.benchmark`, which `dcnseg train` leaves off.
TRAININGS = (("resnet18", False), ("resnet50", False), ("resnet50", True))


def bench_regions(device: torch.device, *, rounds: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield a row for each RoI operator, feature map and pass, in float32."""
    clock = GpuClock(device, calls=2 if quick else 10)
    for comparison in make_comparisons(quick=quick, device=device):
        for passed, timings in comparison.time(rounds, clock).items():
            contenders = {
                name: {
                    "milliseconds": timing.median,
                    "spread": timing.spread,
                    "ratio": timing.ratio_to(timings[OURS]),
                }
                for name, timing in timings.items()
            }
            yield {"subject": comparison.subject, "pass": passed, "contenders": contenders}


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as tables; the most important ones come last."""
    parts = []
    for row in report["convolutions"]:
        if row["kernels"] and row["layout"] == "channels-last":
            parts.append(f"Kernels of {row['shape']} {row['dtype']} {row['layout']}, {row['pass']}")
            parts.append(_kernel_table(row["kernels"]))
    for training in report["training"]:
        for name, one in training["models"].items():
            parts.append(f"Kernels of the {name} step, {training['encoder']}, {training['cudnn']}")
            parts.append(_kernel_table(one["kernels"]))
    parts.append(markdown_table(("what", "value"), report["machine"].items()))
    units = {name: "TB/s" if name == "copy" else "TFLOP/s" for name in report["ceilings"]}
    rows = [(name, f"{value:.3g} {units[name]}") for name, value in report["ceilings"].items()]
    parts.append(markdown_table(("measured limit", "value"), rows))
    region_cells = [
        (row["subject"], row["pass"], name, one["milliseconds"], one["spread"], one["ratio"])
        for row in report["regions"]
        for name, one in row["contenders"].items()
    ]
    columns: tuple[str, ...] = ("regions", "pass", "contender", "ms", "± ms", "/ dcnseg")
    parts.append(markdown_table(columns, region_cells))
    columns = ("encoder", "cuDNN", "batch", "model", "ms", "± ms", "/ plain", "images/s")
    columns += ("peak MiB",)
    parts.append(markdown_table(columns, _training_cells(report["training"])))
    columns = ("shape", "dtype", "layout", "pass", "dcnseg ms", "± ms", "dense ms", "/ dense")
    columns += ("torchvision ms", "torchvision / dcnseg", "TFLOP/s", "of arithmetic")
    columns += ("of bandwidth", "MiB", "MiB over dense", "error", "torchvision's error")
    timed = [row for row in report["convolutions"] if row["contenders"]]
    parts.append(markdown_table(columns, map(_convolution_cells, timed)))
    parts += wrong_rows(report)
    return "\n\n".join(parts)


def wrong_rows(report: dict[str, Any]) -> list[str]:
    """Return a line for each wrong result, which was not timed."""
    return [
        f"{row['shape']} {row['dtype']} {row['layout']}: {row['pass']}, "
        f"relative error {row['errors'][OURS]:.2g}"
        for row in report["convolutions"]
        if not row["contenders"]
    ]


def _training_cells(trainings: Sequence[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    for training in trainings:
        for name, one in training["models"].items():
            speed = (one["milliseconds"], one["spread"], one["ratio"], one["images_per_second"])
            about = (training["encoder"], training["cudnn"], training["batch"])
            yield *about, name, *speed, one["peak_mib"]


def _convolution_cells(row: dict[str, Any]) -> tuple[object, ...]:
    ours, dense = row["contenders"][OURS], row["contenders"][DENSE]
    theirs = row["contenders"].get(TORCHVISION, {}).get("milliseconds")
    return (
        *(row[name] for name in ("shape", "dtype", "layout", "pass")),
        *(ours["milliseconds"], ours["spread"], dense["milliseconds"], ours["ratio_to_dense"]),
        *(theirs, theirs and theirs / ours["milliseconds"]),
        *(ours["tflops"], _percent(ours["share_of_arithmetic"])),
        *(_percent(ours["share_of_bandwidth"]), ours["peak_mib"], ours["mib_over_dense"]),
        *(row["errors"].get(name) for name in (OURS, TORCHVISION)),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _kernel_table(kernels: list[dict[str, Any]]) -> str:
    cells = [
        (f"`{one['kernel']}`", one["calls"], one["milliseconds"], _percent(one["share"]))
        for one in kernels
    ]
    return markdown_table(("kernel", "calls", "ms", "share"), cells)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for a dry run")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU found; use --device cpu --quick for a dry run")
    torch.backends.cudnn.benchmark = True  # the fastest setting of the dense convolution
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    report: dict[str, Any] = {
        "machine": describe_gpu(device),
        "ceilings": measure_ceilings(device, tuple(DTYPES), options.quick),
        "convolutions": [],
        "regions": [],
        "training": [],
    }

    def note(part: str, row: dict[str, Any]) -> None:
        """Add a row and write the file, so that an interrupted run keeps its results."""
        report[part].append(row)
        what = (str(value) for value in row.values() if isinstance(value, str | list))
        print(f"{part}:", *list(what)[:4], file=sys.stderr, flush=True)
        if options.out:
            options.out.write_text(json.dumps(report))

    bench = Bench(device, report["ceilings"], options.rounds)
    for row in bench_convolutions(bench, quick=options.quick):
        note("convolutions", row)
    for row in bench_regions(device, rounds=options.rounds, quick=options.quick):
        note("regions", row)
    batch = Batch(2, (64, 64), steps=1, profiled_steps=1) if options.quick else Batch()
    for encoder, is_tuned in TRAININGS[:1] if options.quick else TRAININGS:
        torch.backends.cudnn.benchmark = is_tuned
        row = time_steps(device, options.rounds, batch, encoder)
        note("training", {"cudnn": "tries algorithms" if is_tuned else "as trained", **row})
    print(json.dumps(report) if options.json else to_markdown(report))
    if wrong_rows(report):
        raise SystemExit("; ".join(wrong_rows(report)))


if __name__ == "__main__":
    main()
