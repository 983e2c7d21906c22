"""Which runs the comparison on CamVid consists of; the entry point is `Plan`.

Recipes are compared in calls of their own. Then come the fixed dilations; all these runs have a
seed of their own, and are looked at on val alone. Then the variants, with the dilation that was
best on val, once with every seed. Only these last runs are scored on test, each once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEARCH_SEED = 100  # of the runs that choose something, none of the seeds that are reported
PLAIN, DILATED, V1, V2 = "plain", "dilated", "deformable v1", "deformable v2"
DILATIONS = (4, 6, 8)  # the plain network has 2 in the same three layers

# What all runs have. Nothing is pretrained; weights of classes come from training pixels alone.
COMMON = {
    "--encoder-weights": "none",
    "--amp": "bf16",
    "--scale-range": "0.5,2",
    "--color-jitter": "0.3",
    "--crop-size": "360,480",
    "--batch-size": "16",
    "--optimizer": "adamw",
    "--lr": "0.001",
    "--weight-decay": "0.05",
    "--warmup-epochs": "5",
    "--class-weights": "sqrt",
    "--ema": "0.999",
}
# The first is the default. Each changes some of the above.
RECIPES: Mapping[str, Mapping[str, str]] = {
    "resnet50": {"--encoder": "resnet50"},
    "resnet34": {"--encoder": "resnet34"},
    "resnet18": {"--encoder": "resnet18"},
    # The decoder's finest features have stride 4, too coarse for poles: larger images help.
    "resnet18-large": {
        "--encoder": "resnet18",
        "--input-scale": "1.5",
        "--crop-size": "540,720",
    },
    "resnet34-large": {
        "--encoder": "resnet34",
        "--input-scale": "1.5",
        "--crop-size": "540,720",
    },
    "resnet34-sgd": {
        "--encoder": "resnet34",
        "--optimizer": "sgd",
        "--lr": "0.05",
        "--weight-decay": "0.0005",
    },
    "resnet34-lovasz": {"--encoder": "resnet34", "--loss": "lovasz"},
}
TINY = {
    "--encoder": "resnet18",
    "--input-scale": "0.25",
    "--crop-size": "64,96",
    "--decoder-channels": "16",
    "--batch-size": "8",
    "--warmup-epochs": "0",
    "--amp": "off",
}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        phase: "recipes", "dilations" or "final"; only the last is scored on test.
        dilation: Of the last three 3x3 convolutions; 0: as the output stride has it.
    """

    phase: str
    variant: str
    recipe: str
    epochs: int
    seed: int
    dilation: int = 0
    tiny: bool = False

    @property
    def name(self) -> str:
        """Of its run folder and in the results."""
        variant = self.variant.replace(" ", "-")
        if self.dilation:
            variant += f"-{self.dilation}"
        return f"{self.phase}-{variant}-{self.recipe}-{self.epochs}-seed{self.seed}"

    def options(self) -> list[str]:
        """Options of `dcnseg train`, without folders and what concerns the machine."""
        options = {**COMMON, **RECIPES[self.recipe], **(TINY if self.tiny else {})}
        options |= {"--epochs": str(self.epochs), "--seed": str(self.seed)}
        options["--deform-layers"] = "3" if self.variant in (V1, V2) else "0"
        if self.dilation:
            options["--late-dilation"] = str(self.dilation)
        # Averaged weights at the end of a falling rate are the best or nearly: a few looks suffice.
        often = max(1, self.epochs // 10)
        options |= {"--eval-every": str(often), "--checkpoint-epochs": str(self.epochs)}
        listed = [text for option in options.items() for text in option]
        return [*listed, "--cache"] + ["--modulated"] * (self.variant == V2)


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison, in the order in which they are wanted."""

    recipe: str
    epochs: int
    seeds: int
    search: tuple[str, ...] = ()  # recipes that are compared first
    tiny: bool = False

    def open_jobs(self, runs: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
        """What can be started now and is not among the finished runs."""
        done = {run["name"] for run in runs}
        return (job for job in self._jobs(runs) if job.name not in done)

    def _jobs(self, runs: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
        for recipe in self.search:
            yield Job("recipes", PLAIN, recipe, self.epochs, SEARCH_SEED, tiny=self.tiny)
        if self.search:
            return  # somebody has to look at them
        for dilation in DILATIONS:
            yield self._job("dilations", DILATED, SEARCH_SEED, dilation)
        best = self.best_dilation(runs)
        for seed in range(self.seeds):
            for variant in (PLAIN, V1, V2):
                yield self._job("final", variant, seed)
            if best is not None:
                yield self._job("final", DILATED, seed, best)

    def _job(self, phase: str, variant: str, seed: int, dilation: int = 0) -> Job:
        return Job(phase, variant, self.recipe, self.epochs, seed, dilation, self.tiny)

    def best_dilation(self, runs: Sequence[Mapping[str, Any]]) -> int | None:
        """The one with the highest mIoU on val, once all have been tried."""
        scores = {
            int(run["dilation"]): float(run["val"]["mean_iou"])
            for run in runs
            if (run["phase"], run["recipe"], run["epochs"])
            == ("dilations", self.recipe, self.epochs)
        }
        if set(scores) != set(DILATIONS):
            return None
        return max(scores, key=lambda dilation: scores[dilation])
