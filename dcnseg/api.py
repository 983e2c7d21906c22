"""The functions of the public API: `train`, `resume`, `evaluate`, `compare`, `export_model`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dcnseg.config import (
    ExportConfig,
    PredictConfig,
    TrainConfig,
    dotted_names,
    make_train_config,
)
from dcnseg.data.image_io import read_image
from dcnseg.data.transforms import Augmentation
from dcnseg.engine import comparison, training
from dcnseg.engine.compared_runs import Comparison
from dcnseg.engine.evaluation import evaluate_run, find_own_images
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.trainer import TrainResult
from dcnseg.errors import ConfigError
from dcnseg.export.exporting import ExportResult, export_network
from dcnseg.report.comparison_report import write_comparison
from dcnseg.report.run_charts import keep_report
from dcnseg.scoring.scores import Scores

PathLike = str | Path
AUTO_BATCH_SIZE = "auto"
EXPORT_IMAGES = 3  # of the validation split, to compare an exported model on


def train(
    data: PathLike | TrainConfig,
    out: PathLike,
    *,
    preset: str = "default",
    overwrite: bool = False,
    augment: Augmentation | None = None,
    listener: TrainingListener | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a network on a folder of images and masks, as `dcnseg train` does.

    Args:
        data: The data folder, or a TrainConfig with all settings.
        out: The run folder to write.
        preset: Settings for a size of machine: "small", "default" or "large".
        overwrite: Whether a run that is in the folder may be replaced.
        augment: Called with every training image and its label map before the random crop.
        listener: Notified of epochs, warnings and progress; nothing is printed.
        **settings: The options of the command line by their names: `epochs=20`,
            `encoder="resnet18"`, `crop_size=256`, `batch_size="auto"`.

    Returns:
        The run folder, the best epoch, and its validation scores.

    Raises:
        ConfigError: A setting is unknown or cannot be met, or the folder is not empty.
        DataError: An image or mask is wrong; the message names the file.
        TrainingError: The loss stays not finite, memory runs out, or a worker process dies.
    """
    has_auto_batch = settings.get("batch_size") == AUTO_BATCH_SIZE
    if has_auto_batch:
        del settings["batch_size"]
    if isinstance(data, TrainConfig):
        if settings or preset != "default":
            raise ConfigError(
                "`data` is a TrainConfig, which contains all settings; do not pass other settings."
            )
        config = data
    else:
        config = make_train_config(settings | {"root": Path(data)}, preset)
    dotted = dotted_names()
    with keep_report(Path(out), listener or TrainingListener()) as reporting:
        return training.train(
            config,
            Path(out),
            sources={dotted[name]: "Python" for name in settings},
            overwrite=overwrite,
            has_auto_batch=has_auto_batch,
            augment=augment,
            listener=reporting,
        )


def resume(
    run: PathLike,
    *,
    augment: Augmentation | None = None,
    listener: TrainingListener | None = None,
    **changes: Any,
) -> TrainResult:
    """Resume a run from its last checkpoint, as `dcnseg train --resume` does.

    Args:
        run: The run folder.
        augment: The augmentation that the run was started with.
        listener: As for `train`.
        **changes: Settings that may change, such as `epochs`, `patience`, `device` or `workers`.

    Returns:
        As `train`.

    Raises:
        ConfigError: All epochs are done, or a setting cannot be changed.
        CheckpointError: There is nothing to resume, or the checkpoint is damaged.
        DataError: The data has changed since the run began.
    """
    dotted = dotted_names()
    with keep_report(Path(run), listener or TrainingListener()) as reporting:
        return training.resume(
            Path(run),
            changes={dotted.get(name, name): value for name, value in changes.items()},
            augment=augment,
            listener=reporting,
        )


def compare(
    data: PathLike,
    out: PathLike,
    *,
    variants: Sequence[str] | None = None,
    seeds: int = 1,
    preset: str = "default",
    overwrite: bool = False,
    on_run: Callable[[str], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Train plain and deformable networks under the same conditions, as `dcnseg compare` does.

    Args:
        data: The data folder.
        out: The folder of the comparison to write.
        variants: "plain", "dilationN" with a number, "deformable", "deformable-v2"; None: these
            four, with twice the dilation of the plain network.
        seeds: Number of runs of each variant, with consecutive seeds.
        preset: As for `train`.
        overwrite: Whether to replace a comparison that is in the folder.
        on_run: Called with a line of text before each run.
        **settings: As for `train`, the same for all runs.

    Returns:
        The runs of each variant with their scores, and the differences with their confidence
        intervals; `sentences()` describes them.

    Raises:
        ConfigError: A variant or setting is unknown or cannot be met.
        DataError: An image or mask is wrong; the message names the file.
        TrainingError: As `train`.
    """
    if settings.get("batch_size") == AUTO_BATCH_SIZE:
        raise ConfigError("`batch_size` is 'auto'; pass a number: all runs need the same.")
    config = make_train_config(settings | {"root": Path(data)}, preset)
    dotted = dotted_names()
    result = comparison.compare(
        config,
        Path(out),
        variants=variants,
        seeds=range(config.seed, config.seed + seeds),
        overwrite=overwrite,
        sources={dotted[name]: "Python" for name in settings},
        on_run=on_run,
    )
    write_comparison(result, Path(out))
    return result


def evaluate(
    run: PathLike,
    data: PathLike,
    *,
    split: str = "val",
    device: str = "auto",
    amp: str = "off",
    config: PredictConfig | None = None,
) -> Scores:
    """Score a run on a split of a data folder, as `dcnseg evaluate` does.

    Args:
        run: Run folder, weights file, or ONNX model of `export_model`.
        data: The data folder.
        split: "train", "val", "test" or "all".
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        amp: "off", "auto", "bf16" or "fp16".
        config: Windows and test-time augmentation.

    Raises:
        ConfigError: There is no such split or device.
        CheckpointError: The run has no weights, or they are damaged.
        DataError: The classes of the data are not those of the run, or a file is wrong.
    """
    return evaluate_run(Path(run), Path(data), split, device=device, amp=amp, config=config)


def export_model(
    run: PathLike,
    out: PathLike,
    *,
    format: str = "onnx",
    input: str = "uint8",
    outputs: Sequence[str] = ("labels", "logits"),
    images: Sequence[PathLike] | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write a run's network for other programs, as `dcnseg export` does.

    The exported model is compared with the network on random images and on `images`.

    Args:
        run: Run folder or weights file.
        out: The file to write: .onnx, .xml (with a .bin file beside it) or .pt2.
        format: "onnx", "openvino" or "pt2".
        input: "uint8": RGB images [B, H, W, 3]; "float": images after `Predictor.prepare`.
        outputs: "labels", "probabilities" and "logits", in the order of the outputs.
        images: Image files; None: the first validation images of the run, if they still exist.
        overwrite: Whether to replace an existing file.

    Returns:
        The files, and the largest differences from the network.

    Raises:
        CheckpointError: The weights are missing or damaged.
        ConfigError: A setting is invalid, `out` exists, or a package is not installed.
        DataError: An image cannot be read.
        ExportError: The network cannot be expressed in the format, or the exported model gives
            other results; no file is written then.
    """
    config = ExportConfig(format, input, tuple(outputs))
    if images is None:
        images = find_own_images(Path(run), EXPORT_IMAGES)
    arrays = [read_image(Path(image)) for image in images]
    return export_network(Path(run), Path(out), config, arrays, overwrite=overwrite)
