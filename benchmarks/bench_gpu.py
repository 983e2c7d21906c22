"""Time the operators and a training step on a GPU, with dense and torchvision's beside them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

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
    limits = [
        (name, f"{value:.3g} {'TB/s' if name == 'copy' else 'TFLOP/s'}")
        for name, value in report["ceilings"].items()
    ]
    parts.append(markdown_table(("measured limit", "value"), limits))
    parts.append(_contender_table(report["regions"], ("subject", "pass")))
    parts.append(_contender_table(report["training"], ("encoder", "cudnn", "batch"), "models"))
    parts.append(_contender_table(report["convolutions"], ("shape", "dtype", "layout", "pass")))
    parts += wrong_rows(report)
    return "\n\n".join(parts)


def _contender_table(
    rows: Sequence[dict[str, Any]], about: Sequence[str], contenders: str = "contenders"
) -> str:
    """Return a table with a line per contender; the columns are the keys of the report."""
    columns: list[str] = []
    cells = []
    for row in rows:
        for name, one in row[contenders].items():
            numbers = {key: value for key, value in one.items() if key != "kernels"}
            columns = [*about, contenders.removesuffix("s"), *numbers]
            cells.append((*(row[key] for key in about), name, *numbers.values()))
    return markdown_table(columns, cells)


def wrong_rows(report: dict[str, Any]) -> list[str]:
    """Return a line for each wrong result, which was not timed."""
    return [
        f"{row['shape']} {row['dtype']} {row['layout']}: {row['pass']}, "
        f"relative error {row['errors'][OURS]:.2g}"
        for row in report["convolutions"]
        if not row["contenders"]
    ]


def _kernel_table(kernels: list[dict[str, Any]]) -> str:
    cells = [
        (f"`{one['kernel']}`", one["calls"], one["milliseconds"], f"{100 * one['share']:.0f} %")
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
