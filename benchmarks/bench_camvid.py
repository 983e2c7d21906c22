"""Train DeepLabV3+ on CamVid from scratch: plain, with fixed dilations, and deformable.

Recipes are compared in calls of their own (`--search`), then fixed dilations, both on val and with
a seed that is used for nothing else. The variants are then trained with every seed and evaluated on
test. A finished run is added to the results file and not repeated; an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import describe_gpu, markdown_table
from dcnseg.checkpoint import RESUME_STATE
from dcnseg.device import select_device
from dcnseg.engine.metrics import read_metrics
from dcnseg.files import atomic_path

Run = Mapping[str, Any]

SEARCH_SEED = 100  # of the runs on val, which are not reported
VARIANTS = {
    "plain": "--deform-layers 0",
    "deformable v1": "--deform-layers 3",
    "deformable v2": "--deform-layers 3 --modulated",
    "dilated": "--deform-layers 0 --late-dilation {dilation}",
}
DILATIONS = (4, 6, 8)  # the plain network has 2 in the same three layers
_TRAINING = (
    "--encoder-weights none --amp bf16 --scale-range 0.5,2 --color-jitter 0.3 "
    "--crop-size 360,480 --batch-size 16 --optimizer adamw --lr 0.001 --weight-decay 0.05 "
    "--warmup-epochs 5 --class-weights sqrt --ema 0.999 --cache"
)
# The first is the default. A later option overrides an earlier one.
RECIPES = {
    "resnet50": "--encoder resnet50",
    "resnet34": "--encoder resnet34",
    "resnet18": "--encoder resnet18",
    # The decoder's finest features have stride 4, which is wider than a pole.
    "resnet18-large": "--encoder resnet18 --input-scale 1.5 --crop-size 540,720",
    "resnet34-large": "--encoder resnet34 --input-scale 1.5 --crop-size 540,720",
    "resnet34-sgd": "--encoder resnet34 --optimizer sgd --lr 0.05 --weight-decay 0.0005",
    "resnet34-lovasz": "--encoder resnet34 --loss lovasz",
}
_TINY = (
    "--encoder resnet18 --input-scale 0.25 --crop-size 64,96 --decoder-channels 16 "
    "--batch-size 8 --warmup-epochs 0 --amp off"
)
_TEST_SCORES = {"test": (), "test_augmented": ("--flip", "--scales", "1,1.5")}
_KEPT_METRICS = ("epoch", "loss", "images_per_second", "mean_iou", "seconds")
# Mean IoU on test as published: 11 classes, 480x360, nothing pretrained.
PUBLISHED = {"ENet (Paszke et al. 2016)": 51.3, "FC-DenseNet103 (Jegou et al. 2017)": 66.9}
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True)
class Job:
    """One training run; its phase is "recipes", "dilations" or "final"."""

    phase: str
    variant: str
    recipe: str
    epochs: int
    seed: int
    dilation: int = 0  # of the last three 3x3 convolutions; 0: as for the output stride
    tiny: bool = False

    @property
    def name(self) -> str:
        """Name of the run folder and in the results."""
        variant = f"{self.variant} {self.dilation or ''}".strip().replace(" ", "-")
        return f"{self.phase}-{variant}-{self.recipe}-{self.epochs}-seed{self.seed}"

    def training_options(self) -> list[str]:
        """Return the options of `dcnseg train` except folders and machine."""
        variant = VARIANTS[self.variant].format(dilation=self.dilation)
        text = f"{_TRAINING} {RECIPES[self.recipe]} {_TINY if self.tiny else ''} {variant}"
        # Averaged weights improve until the learning rate ends, so few validations suffice.
        interval = max(1, self.epochs // 10)
        text += f" --epochs {self.epochs} --seed {self.seed}"
        return f"{text} --eval-every {interval} --checkpoint-epochs {interval}".split()


def plan_jobs(options: argparse.Namespace, runs: Sequence[Run]) -> Iterator[Job]:
    """Yield all jobs that can be planned with the finished runs, in order."""
    about = {"recipe": options.recipe, "epochs": options.epochs, "tiny": options.tiny}
    if options.search:
        for recipe in options.search:
            yield Job("recipes", "plain", **(about | {"recipe": recipe}), seed=SEARCH_SEED)
        return  # the user chooses a recipe
    for dilation in DILATIONS:
        yield Job("dilations", "dilated", **about, seed=SEARCH_SEED, dilation=dilation)
    wanted = ("dilations", options.recipe, options.epochs)
    tried = [run for run in runs if (run["phase"], run["recipe"], run["epochs"]) == wanted]
    for seed in range(options.seeds):
        for variant in ("plain", "deformable v1", "deformable v2"):
            yield Job("final", variant, **about, seed=seed)
        if len(tried) == len(DILATIONS):
            best = max(tried, key=lambda run: float(run["val"]["mean_iou"]))
            yield Job("final", "dilated", **about, seed=seed, dilation=best["dilation"])


def make_commands(job: Job, data: Path, folder: Path) -> list[list[str]]:
    """Return the commands that a reader can run: train, and evaluate twice if `job` is final."""
    commands = [["dcnseg", "train", str(data), "--out", str(folder), *job.training_options()]]
    if job.phase == "final":
        score = ["dcnseg", "evaluate", str(folder), str(data), "--split", "test", "--json"]
        commands += [[*score, *augmentation] for augmentation in _TEST_SCORES.values()]
    return commands


def run_job(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; an interrupted training is resumed, a complete one is not repeated.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    folder = options.runs / job.name
    train, *evaluations = make_commands(job, options.data, folder)
    machine = ["--device", options.device]
    metrics = read_metrics(folder)
    if not metrics or metrics[-1]["epoch"] < job.epochs:
        if (folder / RESUME_STATE).is_file():
            train = ["dcnseg", "train", "--resume", str(folder)]
        else:
            train.append("--overwrite")
        call([*train, *machine, "--workers", str(options.workers)], options)
        metrics = read_metrics(folder)
    scores = [json.loads(call([*command, *machine], options)) for command in evaluations]
    validated = [record for record in metrics if record.get("mean_iou") is not None]
    return {
        "name": job.name,
        **asdict(job),
        "parallel": options.parallel,
        "seconds": round(sum(record["seconds"] for record in metrics), 1),
        "commands": make_commands(job, Path("camvid"), Path("runs") / job.name),
        "val": max(validated, key=lambda record: float(record["mean_iou"])),
        **dict.fromkeys(_TEST_SCORES),
        **dict(zip(_TEST_SCORES, scores, strict=False)),
        "metrics": [{key: each[key] for key in _KEPT_METRICS if key in each} for each in metrics],
        "machine": describe_gpu(select_device(options.device)),
    }


def call(command: list[str], options: argparse.Namespace) -> str:
    """Run a command of dcnseg and return its standard output."""
    print(shlex.join(command), file=sys.stderr, flush=True)
    cores = (os.cpu_count() or 1) // options.parallel - options.workers
    program = [sys.executable, "-c", "from dcnseg_cli.main import main; main()"]
    return subprocess.run(
        [*program, *command[1:]],
        env={**os.environ, "OMP_NUM_THREADS": str(max(1, cores))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def run_all(options: argparse.Namespace, runs: list[dict[str, Any]]) -> bool:
    """Run all jobs and add them to `runs` and the results file; return whether all succeeded."""
    failed: set[str] = set()
    with ThreadPoolExecutor(options.parallel) as pool:
        while True:
            done = failed | {run["name"] for run in runs}
            jobs = [job for job in plan_jobs(options, runs) if job.name not in done]
            if not jobs:
                return not failed
            futures = {pool.submit(run_job, job, options): job.name for job in jobs}
            for future in as_completed(futures):
                name = futures[future]
                try:
                    runs.append(future.result())
                except subprocess.CalledProcessError as error:
                    failed.add(name)
                    print(f"{name} failed: {error.stderr[-500:]}", file=sys.stderr, flush=True)
                    continue
                with atomic_path(options.results) as temporary:
                    temporary.write_text(json.dumps({"runs": runs}, indent=1))
                (options.runs / name / RESUME_STATE).unlink(missing_ok=True)  # large


def to_markdown(runs: Sequence[Run]) -> str:
    """Return tables of the searches, the comparison and the classes."""
    if not runs:
        return "No results yet."
    parts = []
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]
    for phase, heading in (("recipes", "Recipes"), ("dilations", "Fixed dilations")):
        rows = [
            (*(run[key] for key in ("name", "epochs", "seconds")), _mean([run["val"]["mean_iou"]]))
            for run in runs
            if run["phase"] == phase
        ]
        if rows:
            columns = ("run", "epochs", "s", "val mIoU")
            parts += [f"{heading}, chosen on val (one run each):", markdown_table(columns, rows)]
    groups: dict[str, list[Run]] = {}  # runs that differ only in the seed
    for run in (run for run in runs if run["phase"] == "final"):
        name = f"{run['variant']} {run['dilation'] or ''}".strip()
        groups.setdefault(f"{name}, {run['recipe']}, {run['epochs']} epochs", []).append(run)
    if not groups:
        return "\n\n".join(parts)
    columns = ("variant", "seeds", "val mIoU", "test mIoU", "test mIoU, augmented")
    columns += ("pixel accuracy, augmented", "s per run")
    scores = [(part, "mean_iou") for part in ("val", *_TEST_SCORES)]
    scores.append(("test_augmented", "pixel_accuracy"))
    rows = []
    for name, group in groups.items():
        means = (_mean([run[part][score] for run in group]) for part, score in scores)
        rows.append((name, len(group), *means, statistics.mean(run["seconds"] for run in group)))
    rows += [(name, None, None, score, None, None, None) for name, score in PUBLISHED.items()]
    parts += ["Mean ± standard deviation over seeds:", markdown_table(columns, rows)]
    rows = []
    for name in next(iter(groups.values()))[0]["test_augmented"]["class_iou"]:
        ious = ([run["test_augmented"]["class_iou"][name] for run in g] for g in groups.values())
        rows.append((name, *map(_mean, ious)))
    parts += ["IoU on test by class, augmented:", markdown_table(("class", *groups), rows)]
    return "\n\n".join(parts)


def _mean(shares: Sequence[float | None]) -> str | None:
    """Return the mean and standard deviation of the known values in percent."""
    percents = [100 * share for share in shares if share is not None]
    if len(percents) < 2:
        return f"{percents[0]:.2f}" if percents else None
    return f"{statistics.mean(percents):.2f} ± {statistics.stdev(percents):.2f}"


def _split(text: str) -> list[str]:
    return list(RECIPES) if text == "all" else text.split(",")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.bench_camvid", description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="CamVid folder; without it, report only")
    parser.add_argument("--results", type=Path, required=True, help="JSON file of finished runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid"), help="run folders")
    parser.add_argument("--parallel", type=int, default=4, help="simultaneous runs")
    parser.add_argument("--workers", type=int, default=3, help="loading processes of a run")
    parser.add_argument("--recipe", choices=RECIPES, default=next(iter(RECIPES)))
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument(
        "--search", type=_split, default=[], help="compare recipes on val: A,B,C or all"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="small network and images, to test")
    parser.add_argument("--page", type=Path, help="Markdown page in which to replace the tables")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.search) - set(RECIPES):
        parser.error(f"--search: unknown {', '.join(unknown)}; expected {', '.join(RECIPES)}")
    runs = json.loads(options.results.read_text())["runs"] if options.results.is_file() else []
    is_ok = options.data is None or run_all(options, runs)
    tables = to_markdown(runs)
    print(tables)
    if options.page:
        before, _, rest = options.page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        options.page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
