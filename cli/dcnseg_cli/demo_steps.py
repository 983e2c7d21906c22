"""The steps of `dcnseg demo`, each by the function that its command calls."""

from __future__ import annotations

from pathlib import Path

from dcnseg.config import DataConfig, ModelConfig, TrainConfig
from dcnseg.data.synthetic import write_scenes
from dcnseg.engine.evaluation import evaluate_run
from dcnseg.engine.training import train
from dcnseg.errors import DataError
from dcnseg.files import mark_output_folder
from dcnseg.inference.batch import predict_files
from dcnseg.inference.inputs import find_inputs
from dcnseg.inference.predictor import Predictor
from dcnseg.visualize.run import visualize_files
from dcnseg_cli.evaluate import print_scores
from dcnseg_cli.reporting import message
from dcnseg_cli.training_display import training_display

SCENE_SIZE = (128, 160)
TRAIN_SCENES = 96
VAL_SCENES = 24
DRAWN_SCENES = 3


def demo_config(scenes: Path, *, seed: int, device: str) -> TrainConfig:
    """Settings that reach a good score on the scenes in under two minutes on two CPU cores."""
    return TrainConfig(
        data=DataConfig(
            root=scenes,
            crop_size=SCENE_SIZE,
            scale_range=(0.8, 1.25),
            workers=0,
            cache=True,
        ),
        model=ModelConfig(encoder="resnet18", decoder_channels=128),
        encoder_weights="none",
        epochs=24,
        batch_size=8,
        lr=0.05,
        ema=0.98,
        eval_every=4,
        seed=seed,
        device=device,
    )


def run_demo(folder: Path, *, seed: int, device: str) -> None:
    """Generate scenes, train on them, evaluate, predict and draw the offsets.

    Args:
        folder: Everything is written below it.
        seed: Of the scenes and of training.
        device: As `--device`.
    """
    scenes, run = folder / "scenes", folder / "run"
    message(f"1/5  Generate {TRAIN_SCENES + VAL_SCENES} scenes in {scenes}")
    write_scenes(scenes, train=TRAIN_SCENES, val=VAL_SCENES, size_hw=SCENE_SIZE, seed=seed)
    message("2/5  Train a DeepLabV3+ whose last three 3x3 convolutions are deformable")
    with training_display() as listener:
        config = demo_config(scenes, seed=seed, device=device)
        train(config, run, overwrite=True, listener=listener)
    message("3/5  Evaluate on the validation scenes")
    print_scores(evaluate_run(run, scenes, "val", device=device), "val")
    images = find_inputs([str(scenes / "val" / "images")])
    message("4/5  Predict the validation scenes")
    for name in ("predictions", "offsets"):
        mark_output_folder(folder / name)
    predictor = Predictor.from_checkpoint(run, device=device)
    predict_files(predictor, images, folder / "predictions", ("labels", "overlay"))
    message("5/5  Visualize the offsets")
    drawn = images[:DRAWN_SCENES]
    height, width = SCENE_SIZE
    center = (float(width // 2), float(height // 2))
    for result in visualize_files(run, drawn, folder / "offsets", [center], device=device):
        if result.error is not None:
            raise DataError(result.error)
