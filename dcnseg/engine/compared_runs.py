"""Scores of the runs of a comparison, and how sure their differences are.

Entry point: `evaluate_runs`, which returns a `Comparison`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Final

import numpy as np

from dcnseg.config import TrainConfig
from dcnseg.data.image_io import read_image
from dcnseg.data.sample import Sample
from dcnseg.engine.evaluation import check_classes, evaluate, splits_of_run
from dcnseg.engine.metrics import read_metrics
from dcnseg.inference.predictor import Predictor
from dcnseg.models.offset_ablation import ABLATIONS, replace_offsets
from dcnseg.scoring.bootstrap import Interval, compare_mean_iou
from dcnseg.scoring.scores import Scores
from dcnseg.visualize.measures.measuring import measure_offsets
from dcnseg.visualize.measures.results import OffsetMeasures

TIMED_IMAGES: Final = 5
TIMED_ROUNDS: Final = 5
MIN_IMAGES: Final = 10  # below, the bootstrap has too little to draw from


@dataclass(frozen=True)
class TrainedRun:
    """A run to compare; `seed` is None if it was trained before."""

    variant: str
    folder: Path
    seed: int | None


@dataclass(frozen=True)
class OffsetEvidence:
    """What the offsets of a run contribute.

    Attributes:
        mean_iou: Mean IoU with the offsets replaced, by the names in ABLATIONS.
        measures: What the offsets do on the compared images, without receptive fields.
    """

    mean_iou: Mapping[str, float]
    measures: OffsetMeasures


@dataclass(frozen=True)
class RunResult:
    """A run and its scores on the compared split."""

    run: TrainedRun
    val_mean_iou: float
    scores: Scores
    num_parameters: int
    training_seconds: float
    offsets: OffsetEvidence | None = None


@dataclass(frozen=True)
class VariantResult:
    """The runs of a variant."""

    name: str
    runs: tuple[RunResult, ...]
    ms_per_image: float = float("nan")

    @property
    def is_deformable(self) -> bool:
        """Whether a run has deformable layers."""
        return any(run.offsets is not None for run in self.runs)

    @property
    def mean_ious(self) -> list[float]:
        """Mean IoU of each run on the compared split."""
        return [run.scores.mean_iou for run in self.runs]

    @property
    def val_mean_iou(self) -> float:
        """Mean IoU on the validation images, averaged over the runs."""
        return self.average(lambda run: run.val_mean_iou)

    def average(self, score: Callable[[RunResult], float]) -> float:
        """A score, averaged over the runs."""
        return mean(score(run) for run in self.runs)


@dataclass(frozen=True)
class Difference:
    """The difference between two variants in mean IoU.

    Attributes:
        variant: Name of the first variant.
        reference: Name of the second.
        interval: First minus second, with the 95 % confidence interval.
        is_overlapping: Whether the scores of the two variants' runs overlap.
        num_runs: Runs of each variant, the smaller number.
        num_images: Compared images.
    """

    variant: str
    reference: str
    interval: Interval
    is_overlapping: bool
    num_runs: int
    num_images: int

    @property
    def is_conclusive(self) -> bool:
        """Whether there are enough runs and images, and both the interval and the runs agree."""
        has_enough = self.num_runs > 1 and self.num_images >= MIN_IMAGES
        return has_enough and self.interval.excludes_zero and not self.is_overlapping

    def describe(self, role: str = "") -> str:
        """Describe the difference in one sentence; `role` explains the second variant."""
        interval, amount = self.interval, abs(self.interval.difference)
        numbers = f"95 % CI {interval.low:.3f} to {interval.high:.3f}, {self.num_runs} seeds"
        if self.is_conclusive:
            word = "better" if interval.difference > 0 else "worse"
            return (
                f"{self.variant} is {word} than {self.reference}{role} by {amount:.3f} mIoU "
                f"({numbers})."
            )
        reference = f"{self.reference}{role}".rstrip(",")
        if self.num_runs == 1:
            word = "higher" if interval.difference > 0 else "lower"
            return (
                f"{self.variant} scored {amount:.3f} mIoU {word} than {reference}, in one run "
                "each. One run does not show a difference; compare several with --seeds."
            )
        if self.num_images < MIN_IMAGES:
            reason = f"{self.num_images} images are too few"
        elif self.interval.excludes_zero:
            reason = f"{numbers}; the scores of their runs overlap"
        else:
            reason = numbers
        return (
            f"No difference could be shown between {self.variant} and {reference}: "
            f"{interval.difference:+.3f} mIoU ({reason})."
        )


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        config: The settings of the runs that were trained for it.
        command: The command that started it, or "".
        split: The compared split, "test" or "val".
        num_images: Its number of images.
        variants: The variants in the order they were given.
        baseline: Name of the variant without offsets that has the best validation score; of any
            variant if all have offsets.
        differences: Each deformable variant against the baseline, then the baseline against the
            other variants without offsets.
        failed: Why runs failed, by the name of their folder.
    """

    config: TrainConfig
    command: str
    split: str
    num_images: int
    variants: tuple[VariantResult, ...]
    baseline: str
    differences: tuple[Difference, ...]
    failed: Mapping[str, str]

    @property
    def has_trained_runs(self) -> bool:
        """Whether some runs were trained before, with settings of their own."""
        return any(run.run.seed is None for variant in self.variants for run in variant.runs)

    def sentences(self) -> list[str]:
        """What the comparison shows, the deformable variants first."""
        fixed = sum(not variant.is_deformable for variant in self.variants)
        role = ", the best fixed grid," if fixed > 1 else ""
        return [
            difference.describe(role if difference.reference == self.baseline else "")
            for difference in self.differences
        ]


def evaluate_runs(
    config: TrainConfig,
    runs: Sequence[TrainedRun],
    *,
    command: str,
    failed: Mapping[str, str],
    on_run: Callable[[str], None],
) -> Comparison:
    """Evaluate runs on the test images, or on the validation images if there are none.

    Args:
        config: The settings, with the data folder.
        runs: The runs, grouped by variant.
        command: See `Comparison`.
        failed: See `Comparison`.
        on_run: Called with a line of text before each run.
    """
    splits = splits_of_run(runs[0].folder, config.data.root, config.data.source)
    split = "test" if splits.test else "val"
    samples = getattr(splits, split)
    results: dict[str, list[RunResult]] = {}
    for number, run in enumerate(runs, 1):
        on_run(f"Evaluate {number} of {len(runs)}: {run.folder}")
        results.setdefault(run.variant, []).append(_evaluate(run, samples, config))
    variants = [VariantResult(name, tuple(of_variant)) for name, of_variant in results.items()]
    on_run("Measure the time per image")
    times = _time_variants(variants, samples, config.device)
    variants = [replace(v, ms_per_image=ms) for v, ms in zip(variants, times, strict=True)]
    fixed = [variant for variant in variants if not variant.is_deformable]
    baseline = max(fixed or variants, key=lambda v: np.nan_to_num(v.val_mean_iou, nan=-1.0))
    others = sorted((v for v in variants if v is not baseline), key=lambda v: not v.is_deformable)
    pairs = [(v, baseline) if v.is_deformable else (baseline, v) for v in others]
    differences = tuple(_difference(*pair, len(samples)) for pair in pairs)
    return Comparison(
        config,
        command,
        split,
        len(samples),
        tuple(variants),
        baseline.name,
        differences,
        dict(failed),
    )


def _evaluate(run: TrainedRun, samples: Sequence[Sample], config: TrainConfig) -> RunResult:
    predictor = Predictor.from_checkpoint(run.folder, device=config.device)
    check_classes(config.data.root, predictor.class_map)
    scores = evaluate(predictor, samples, has_details=True)
    epochs = read_metrics(run.folder)
    known = [epoch["mean_iou"] for epoch in epochs if epoch.get("mean_iou") is not None]
    offsets = None
    if predictor.model.deformable_layers():
        replaced = {}
        for mode in ABLATIONS:
            with replace_offsets(predictor.model, mode):
                replaced[mode] = evaluate(predictor, samples).mean_iou
        offsets = OffsetEvidence(replaced, measure_offsets(predictor, samples, pixels_per_class=0))
    return RunResult(
        run,
        max(known, default=float("nan")),
        scores,
        sum(parameter.numel() for parameter in predictor.model.parameters()),
        sum(epoch.get("seconds", 0.0) for epoch in epochs),
        offsets,
    )


def _time_variants(
    variants: Sequence[VariantResult], samples: Sequence[Sample], device: str
) -> list[float]:
    """The median time of a prediction of each variant's first run, in ms; they take turns."""
    folders = [variant.runs[0].run.folder for variant in variants]
    predictors = [Predictor.from_checkpoint(folder, device=device) for folder in folders]
    images = [read_image(sample.image) for sample in samples[:TIMED_IMAGES]]
    times: list[list[float]] = [[] for _ in predictors]
    for is_timed in (False, *(True,) * TIMED_ROUNDS):
        for of_predictor, predictor in zip(times, predictors, strict=True):
            for image in images:
                start = time.perf_counter()
                predictor.predict(image)
                if is_timed:
                    of_predictor.append(1000 * (time.perf_counter() - start))
    return [median(of_predictor) for of_predictor in times]


def _difference(variant: VariantResult, reference: VariantResult, num_images: int) -> Difference:
    first, second = (
        np.stack([run.scores.image_counts for run in each.runs]) for each in (variant, reference)
    )
    is_overlapping = max(min(variant.mean_ious), min(reference.mean_ious)) <= min(
        max(variant.mean_ious), max(reference.mean_ious)
    )
    return Difference(
        variant.name,
        reference.name,
        compare_mean_iou(first, second),
        is_overlapping,
        min(len(variant.runs), len(reference.runs)),
        num_images,
    )
