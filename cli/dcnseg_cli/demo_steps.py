"""The steps of `dcnseg demo`, each by the function that its command calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcnseg.config import DataConfig, ModelConfig, TrainConfig
from dcnseg.data.dataset import load_pair
from dcnseg.data.sample import Sample
from dcnseg.data.synthetic import SCENE_SIZE, generate_caps, get_scene_seed, write_scenes
from dcnseg.engine.evaluation import evaluate, find_evaluated_samples
from dcnseg.engine.training import train
from dcnseg.errors import DataError
from dcnseg.files import mark_output_folder
from dcnseg.inference.batch import predict_files
from dcnseg.inference.inputs import find_inputs
from dcnseg.inference.predictor import Predictor
from dcnseg.report.evaluation_report import write_evaluation
from dcnseg.report.run_charts import keep_report
from dcnseg.visualize.explorer.page import (
    GalleryEntry,
    make_thumbnail,
    write_explorer,
    write_gallery,
)
from dcnseg.visualize.measures.measuring import OffsetSums
from dcnseg.visualize.measures.results import OnObject
from dcnseg.visualize.offsets import capture_offsets
from dcnseg.visualize.points import choose_points
from dcnseg.visualize.run import visualize_files
from dcnseg_cli.evaluate import print_scores
from dcnseg_cli.reporting import message
from dcnseg_cli.training_display import training_display

TRAIN_SCENES = 320
VAL_SCENES = 24
DRAWN_SCENES = 2
EXPLORED_SCENES = 2
EXPLORER_INDEX = "index.html"


@dataclass(frozen=True)
class DemoResult:
    """The mIoU, and shares of the sampling points of the last layers in cascade, from the beads.

    Attributes:
        mean_iou: On the validation scenes.
        on_bead: Share of the points on the bead of their center.
        on_caps: Share of the points on the caps of that bead, which show its class.
    """

    mean_iou: float
    on_bead: OnObject
    on_caps: OnObject


def demo_config(scenes: Path, *, seed: int, device: str) -> TrainConfig:
    """Settings that reach a good score on the scenes in about two minutes on two CPU cores.

    A small network whose feature map has 24x24 cells, so that the offsets have something to adapt.
    """
    return TrainConfig(
        data=DataConfig(
            root=scenes,
            crop_size=SCENE_SIZE,
            scale_range=(1, 1),
            vertical_flip=True,
            workers=0,
            cache=True,
        ),
        model=ModelConfig(
            encoder="resnet18", encoder_depth=3, architecture="plain", late_dilation=2
        ),
        encoder_weights="none",
        epochs=10,
        batch_size=8,
        optimizer="adamw",
        lr=2e-3,
        offset_lr_scale=1.0,
        weight_decay=1e-3,
        eval_every=5,
        seed=seed,
        device=device,
    )


def run_demo(folder: Path, *, seed: int, device: str) -> DemoResult:
    """Generate scenes, train on them, evaluate, predict, and show and measure the offsets.

    Args:
        folder: Everything is written below it.
        seed: Of the scenes and of training.
        device: As `--device`.
    """
    scenes, run = folder / "scenes", folder / "run"
    message(f"1/5  Generate {TRAIN_SCENES + VAL_SCENES} scenes in {scenes}")
    write_scenes(scenes, train=TRAIN_SCENES, val=VAL_SCENES, seed=seed)
    message("2/5  Train a network whose last three 3x3 convolutions are deformable")
    with training_display() as display, keep_report(run, display) as listener:
        config = demo_config(scenes, seed=seed, device=device)
        train(config, run, overwrite=True, listener=listener)
    message("3/5  Evaluate on the validation scenes")
    predictor = Predictor.from_checkpoint(run, device=device)
    samples = find_evaluated_samples(run, scenes, "val")
    scores = evaluate(predictor, samples, has_details=True)
    print_scores(scores, "val")
    write_evaluation(folder / "evaluation", predictor, samples, scores, "val")
    images = find_inputs([str(scenes / "val" / "images")])
    message("4/5  Predict the validation scenes")
    for name in ("predictions", "offsets", "explorer"):
        mark_output_folder(folder / name)
    predict_files(predictor, images, folder / "predictions", ("labels", "overlay"))
    message("5/5  Visualize the offsets")
    drawn = images[:DRAWN_SCENES]
    for result in visualize_files(run, drawn, folder / "offsets", device=device):
        if result.error is not None:
            raise DataError(result.error)
    _write_pages(folder / "explorer", predictor, samples[:EXPLORED_SCENES])
    return DemoResult(scores.mean_iou, *_measure(predictor, samples, seed))


def _write_pages(out: Path, predictor: Predictor, samples: Sequence[Sample]) -> None:
    """Write pages to explore the offsets, with points on a large and a small bead."""
    entries = []
    for sample in samples:
        image, labels = load_pair(sample, predictor.class_map)
        pins = [point.xy for point in choose_points(labels, predictor.class_map)[:0:-1]]
        page = out / f"{sample.stem}.html"
        write_explorer(
            page,
            predictor,
            image,
            labels=labels,
            title=sample.stem,
            pins=pins,
            is_cascade=True,
            gallery=EXPLORER_INDEX,
        )
        entries.append(GalleryEntry(sample.stem, page, make_thumbnail(image)))
    write_gallery(out / EXPLORER_INDEX, entries, title="Where the network looks")


def _measure(
    predictor: Predictor, samples: Sequence[Sample], seed: int
) -> tuple[OnObject, OnObject]:
    """Measure the shares of the sampling points on the bead of their center, and on its caps."""
    sums = OffsetSums(predictor.class_map)
    for index, sample in enumerate(samples):
        image, labels = load_pair(sample, predictor.class_map)
        layers = capture_offsets(predictor.model, predictor.prepare(image), image.shape[:2])
        sums.add(layers, labels, generate_caps(get_scene_seed(seed, "val", index)))
    return sums.cascade_shares()
