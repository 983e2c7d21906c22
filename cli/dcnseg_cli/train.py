"""`dcnseg train`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from dcnseg.config import (
    ARCHITECTURES,
    ATROUS_RATES_BY_STRIDE,
    CLASS_WEIGHTS,
    LOSSES,
    OPTIMIZERS,
    PRESETS,
    RESUMABLE_SETTINGS,
    DataConfig,
    ModelConfig,
    TrainConfig,
    dotted_names,
    flatten_settings,
    unflatten_settings,
)
from dcnseg.validation import did_you_mean
from dcnseg_cli.options import (
    DATA_PANEL,
    AmpOption,
    IgnoreIndexOption,
    ImagesPatternOption,
    MasksPatternOption,
    OverwriteOption,
    PairsOption,
    choice_option,
    comma_list,
    device_option,
    parse_ignore_index,
    parse_integers,
    parse_numbers,
)
from dcnseg_cli.reporting import message, raise_if_signalled, report_errors

if TYPE_CHECKING:
    from dcnseg.engine.trainer import TrainResult

AUGMENTATION_PANEL = "Augmentation"
MODEL_PANEL = "Model"
LEARNING_PANEL = "Learning"
MACHINE_PANEL = "Machine"
OUTPUT_PANEL = "Output"

EPILOG = """
Examples:

  dcnseg train photos --out runs/photos

  dcnseg train photos --out runs/small --preset small --epochs 60

  dcnseg train photos --out runs/more --init runs/photos

  dcnseg train --resume runs/photos
"""

# Proposed by the shell: one per size of the families that were tried (docs/training.md).
ENCODERS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "se_resnet50", "se_resnext50_32x4d"),
    *("dpn68", "mobilenet_v2", "timm-efficientnet-b0", "timm-skresnet18", "mit_b0", "mit_b1"),
    *("mobileone_s1", "tu-res2net50_26w_4s", "tu-regnetx_002", "tu-resnest14d", "tu-repvgg_a0"),
)

STRIDES = tuple(map(str, sorted(ATROUS_RATES_BY_STRIDE)))
AUTO = "auto"
DEFAULT_PRESET = "default"
DOTTED_NAMES = {"data": "data.root"} | {k: v for k, v in dotted_names().items() if k != "root"}
RESUMABLE_OPTIONS = [name for name, dotted in DOTTED_NAMES.items() if dotted in RESUMABLE_SETTINGS]


class TrainCommand(TyperCommand):
    """Accepts the British spelling of an option, which earlier versions had."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command line."""
        return super().parse_args(ctx, [re.sub("^--colour-", "--color-", arg) for arg in args])


def _option(help_text: str, panel: str | None, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar)


@report_errors
def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATA]",
            help="Data folder: train/images and train/masks (and val, test), images and masks, or "
            "another common layout.",
        ),
    ] = None,
    out: Annotated[Path | None, _option("Run folder to write.", None, "--out", "-o")] = None,
    preset: Annotated[
        str,
        choice_option(
            "Settings for a size of machine; other options override them.",
            tuple(PRESETS),
        ),
    ] = DEFAULT_PRESET,
    resume: Annotated[
        Path | None,
        _option(
            "Resume this run. Only these options can be changed: "
            + ", ".join(f"--{name.replace('_', '-')}" for name in RESUMABLE_OPTIONS)
            + ".",
            None,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        _option(
            "Start from the trained weights of a run or weights file, including the decoder.",
            None,
            metavar="RUN_OR_FILE",
        ),
    ] = TrainConfig.init,
    encoder: Annotated[
        str,
        choice_option(
            "Encoder from segmentation-models-pytorch; the ResNet family works best.",
            ENCODERS,
            metavar="NAME",
        ),
    ] = ModelConfig.encoder,
    epochs: Annotated[int, _option("Number of epochs, at least 1.", None)] = TrainConfig.epochs,
    batch_size: Annotated[
        str,
        _option(
            f"Images per batch, at least 2; {AUTO} finds the largest size that fits in memory.",
            None,
            metavar=f"N|{AUTO}",
        ),
    ] = str(TrainConfig.batch_size),
    crop_size: Annotated[
        str,
        _option(
            "Size of random crops in pixels after --input-scale, at least 32.",
            None,
            metavar="SIZE|HEIGHT,WIDTH",
        ),
    ] = comma_list(DataConfig.crop_size),
    lr: Annotated[float, _option("Peak learning rate, above 0.", None)] = TrainConfig.lr,
    device: Annotated[str, device_option(None)] = TrainConfig.device,
    images: ImagesPatternOption = DataConfig.images,
    masks: MasksPatternOption = DataConfig.masks,
    pairs: PairsOption = DataConfig.pairs,
    val_fraction: Annotated[
        float,
        _option(
            "Fraction used for validation if DATA has no val split, between 0 and 1.", DATA_PANEL
        ),
    ] = DataConfig.val_fraction,
    ignore_index: IgnoreIndexOption = None,
    mask_threshold: Annotated[
        int,
        _option(
            "Treat mask values of at least this threshold as foreground; 0: masks contain class "
            "ids.",
            DATA_PANEL,
        ),
    ] = DataConfig.mask_threshold,
    input_scale: Annotated[
        float, _option("Resize images by this factor, in predictions too; at most 4.", DATA_PANEL)
    ] = DataConfig.input_scale,
    cache: Annotated[
        bool,
        _option("Keep decoded training images in memory.", DATA_PANEL, "--cache/--no-cache"),
    ] = DataConfig.cache,
    scale_range: Annotated[
        str,
        _option("Range of the random scale factor.", AUGMENTATION_PANEL, metavar="LOW,HIGH"),
    ] = comma_list(DataConfig.scale_range),
    flip: Annotated[
        bool, _option("Flip images horizontally at random.", AUGMENTATION_PANEL)
    ] = DataConfig.flip,
    vertical_flip: Annotated[
        bool,
        _option("Flip images vertically at random.", AUGMENTATION_PANEL, "--vertical-flip"),
    ] = DataConfig.vertical_flip,
    rotate: Annotated[
        float,
        _option(
            "Random rotation: 90 or 180 rotates by multiples of this angle without interpolation, "
            "any other value by an angle between -DEGREES and DEGREES; 0: off.",
            AUGMENTATION_PANEL,
            metavar="DEGREES",
        ),
    ] = DataConfig.rotate,
    color_jitter: Annotated[
        float, _option("Strength of random color changes, 0 to 1.", AUGMENTATION_PANEL)
    ] = DataConfig.color_jitter,
    blur: Annotated[
        float,
        _option(
            "Blur half of the images with a random sigma up to this value, at most 10; 0: off.",
            AUGMENTATION_PANEL,
            metavar="PIXELS",
        ),
    ] = DataConfig.blur,
    architecture: Annotated[
        str, choice_option("Architecture of the decoder.", ARCHITECTURES, MODEL_PANEL)
    ] = ModelConfig.architecture,
    encoder_weights: Annotated[
        str,
        _option(
            "imagenet, none, another weights name that segmentation-models-pytorch provides for "
            "the encoder, or a local file.",
            MODEL_PANEL,
        ),
    ] = TrainConfig.encoder_weights,
    output_stride: Annotated[
        int,
        choice_option("Output stride of the encoder.", STRIDES, MODEL_PANEL),
    ] = ModelConfig.output_stride,
    deform_layers: Annotated[
        int,
        _option(
            "Number of deformable 3x3 convolutions, counted from the end of the encoder; 0: none.",
            MODEL_PANEL,
        ),
    ] = ModelConfig.deform_layers,
    late_dilation: Annotated[
        int,
        _option(
            "Dilation of the last three 3x3 convolutions; 0: set by the output stride.",
            MODEL_PANEL,
        ),
    ] = ModelConfig.late_dilation,
    modulated: Annotated[
        bool, _option("Use modulated deformable convolution (DCNv2).", MODEL_PANEL, "--modulated")
    ] = ModelConfig.modulated,
    offset_groups: Annotated[
        int, _option("Number of offset groups, at least 1.", MODEL_PANEL)
    ] = ModelConfig.offset_groups,
    decoder_channels: Annotated[
        int, _option("Channels of the ASPP and the decoder, at least 1.", MODEL_PANEL)
    ] = ModelConfig.decoder_channels,
    atrous_rates: Annotated[
        str,
        _option(
            "Three atrous rates of the ASPP; empty: those of the paper for the output stride.",
            MODEL_PANEL,
        ),
    ] = comma_list(ModelConfig.atrous_rates),
    accumulate: Annotated[
        int,
        _option("Batches per optimizer step (gradient accumulation), at least 1.", LEARNING_PANEL),
    ] = TrainConfig.accumulate,
    optimizer: Annotated[
        str, choice_option("Optimizer.", OPTIMIZERS, LEARNING_PANEL)
    ] = TrainConfig.optimizer,
    offset_lr_scale: Annotated[
        float,
        _option(
            "Learning rate of the offset branches relative to --lr, at least 0.", LEARNING_PANEL
        ),
    ] = TrainConfig.offset_lr_scale,
    weight_decay: Annotated[
        float,
        _option(
            "Weight decay, not applied to biases and normalization, at least 0.", LEARNING_PANEL
        ),
    ] = TrainConfig.weight_decay,
    warmup_epochs: Annotated[
        float,
        _option(
            "Warmup epochs, in which the learning rate rises linearly, at least 0.", LEARNING_PANEL
        ),
    ] = TrainConfig.warmup_epochs,
    poly_power: Annotated[
        float,
        _option("Power of the polynomial learning rate schedule, at least 0.", LEARNING_PANEL),
    ] = TrainConfig.poly_power,
    loss: Annotated[
        str, choice_option("Loss function.", LOSSES, LEARNING_PANEL)
    ] = TrainConfig.loss,
    class_weights: Annotated[
        str,
        choice_option("Class weights by pixel frequency.", CLASS_WEIGHTS, LEARNING_PANEL),
    ] = TrainConfig.class_weights,
    ema: Annotated[
        float,
        _option(
            "Decay of the exponential moving average of the weights, such as 0.999; 0: off.",
            LEARNING_PANEL,
        ),
    ] = TrainConfig.ema,
    eval_every: Annotated[
        int, _option("Validate every N epochs, at least 1.", LEARNING_PANEL)
    ] = TrainConfig.eval_every,
    patience: Annotated[
        int, _option("Stop after N epochs without improvement; 0: never.", LEARNING_PANEL)
    ] = TrainConfig.patience,
    nan_patience: Annotated[
        int,
        _option(
            "Stop after N consecutive steps with a non-finite loss or gradient, at least 1.",
            LEARNING_PANEL,
        ),
    ] = TrainConfig.nan_patience,
    seed: Annotated[int, _option("Random seed, 0 to 2^32 - 1.", LEARNING_PANEL)] = TrainConfig.seed,
    amp: AmpOption = TrainConfig.amp,
    workers: Annotated[
        int,
        _option("Worker processes that load images; 0: load in the main process.", MACHINE_PANEL),
    ] = DataConfig.workers,
    overwrite: OverwriteOption = False,
    tensorboard: Annotated[
        bool, _option("Also write TensorBoard events.", OUTPUT_PANEL, "--tensorboard")
    ] = TrainConfig.tensorboard,
    checkpoint_minutes: Annotated[
        float,
        _option(
            "Save a checkpoint every N minutes within an epoch; 0: only at the end of epochs.",
            OUTPUT_PANEL,
        ),
    ] = TrainConfig.checkpoint_minutes,
    checkpoint_epochs: Annotated[
        int,
        _option("Save a checkpoint every N epochs, at least 1.", OUTPUT_PANEL),
    ] = TrainConfig.checkpoint_epochs,
) -> None:
    """Train a DeepLab with deformable convolutions on a folder of images and masks."""
    options = context.params
    given = {
        name
        for name in options
        if (source := context.get_parameter_source(name))
        and source.name not in ("DEFAULT", "DEFAULT_MAP")
    }
    if resume is not None:
        _resume(resume, options, given)
        return
    if data is None or out is None:
        raise typer.BadParameter(
            "pass DATA and --out RUN, or --resume RUN.", param_hint="DATA / --out"
        )
    if init is not None and "encoder_weights" in given:
        raise typer.BadParameter(
            "--init loads the encoder too; omit --encoder-weights.", param_hint="--init"
        )
    if preset not in PRESETS:
        raise typer.BadParameter(
            f"{preset!r} is not one of {', '.join(PRESETS)}.{did_you_mean(preset, PRESETS)}",
            param_hint="--preset",
        )
    from dcnseg.engine import training
    from dcnseg_cli.training_display import training_display

    from_options = _settings(options)
    from_preset = {
        name: value
        for name, value in PRESETS[preset].items()
        if name not in {DOTTED_NAMES.get(option) for option in given}
    }
    sources = {
        dotted: "command line" if option in given else "default"
        for option, dotted in DOTTED_NAMES.items()
        if option in options
    }
    sources |= dict.fromkeys(from_preset, f"preset {preset}")
    if batch_size == AUTO:
        sources["batch_size"] = "command line, found by trying"
    with _suggest_resume(out), training_display() as listener:
        result = training.train(
            unflatten_settings(from_options | from_preset),
            out,
            sources=sources,
            overwrite=overwrite,
            has_auto_batch=batch_size == AUTO,
            listener=listener,
        )
    _report(result)


def _resume(run: Path, options: Mapping[str, Any], given: set[str]) -> None:
    from dcnseg.engine import training
    from dcnseg.engine.run_folder import read_run
    from dcnseg_cli.training_display import training_display

    if given - set(RESUMABLE_OPTIONS) - {"resume"}:
        _refuse_changes(run, read_run(run).config, options, given)
    settings = _settings(options)
    changes = {
        DOTTED_NAMES[name]: settings[DOTTED_NAMES[name]]
        for name in given - {"resume"}
        if name in RESUMABLE_OPTIONS
    }
    with _suggest_resume(run), training_display() as listener:
        result = training.resume(run, changes=changes, listener=listener)
    _report(result)


@contextmanager
def _suggest_resume(run: Path) -> Iterator[None]:
    from dcnseg.checkpoint import RESUME_STATE

    try:
        yield
    except KeyboardInterrupt:
        if (run / RESUME_STATE).is_file():
            message(f"Resume with: dcnseg train --resume {shlex.quote(str(run))}")
        raise


def _report(result: TrainResult) -> None:
    from dcnseg_cli.training_report import report_training

    report_training(result)
    raise_if_signalled()  # one that came when nothing was left to do


def _refuse_changes(
    run: Path, config: TrainConfig, options: Mapping[str, Any], given: set[str]
) -> None:
    """Raise a usage error if options contradict the config of a run that is to be resumed."""
    before = flatten_settings(config)
    settings = _settings(options)
    for name in ("data.root", "data.pairs", "init"):
        settings[name] = settings[name] and settings[name].resolve()
    asked = {DOTTED_NAMES[name] for name in given if name in DOTTED_NAMES}
    now = flatten_settings(unflatten_settings(before | {name: settings[name] for name in asked}))
    differences = [
        f"{_option_of(name)} is {now[name]}, the run has {before[name]}"
        for name in sorted(asked - set(RESUMABLE_SETTINGS))
        if now[name] != before[name]
    ]
    if "out" in given and options["out"].resolve() != run.resolve():
        differences.append(f"--out is {options['out']}, the run is {run}")
    if "overwrite" in given:
        differences.append("--overwrite would delete the run")
    if "preset" in given:
        differences.append(f"--preset {options['preset']} is for a new run")
    if differences:
        raise typer.BadParameter(
            f"{'; '.join(differences)}. Remove these options: they cannot be changed when a run is "
            "resumed.",
            param_hint="--resume",
        )


def _option_of(dotted_name: str) -> str:
    name = dotted_name.rpartition(".")[2]
    return "DATA" if name == "root" else f"--{name.replace('_', '-')}"


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the options, parsed, by their dotted names."""
    parsed = {
        "ignore_index": parse_ignore_index(options["ignore_index"]),
        "crop_size": parse_integers(options["crop_size"], "--crop-size"),
        "scale_range": parse_numbers(options["scale_range"], "--scale-range"),
        "atrous_rates": parse_integers(options["atrous_rates"], "--atrous-rates"),
        "batch_size": _parse_batch_size(options["batch_size"]),
    }
    return {
        DOTTED_NAMES[name]: value
        for name, value in {**options, **parsed}.items()
        if name in DOTTED_NAMES
    }


def _parse_batch_size(text: str) -> int:
    """Return the number, or the default where the size is to be found by trying."""
    if text == AUTO:
        return TrainConfig.batch_size
    numbers = parse_integers(text, "--batch-size")
    if len(numbers) != 1:
        raise typer.BadParameter(
            f"{text!r} is not an integer or {AUTO}.", param_hint="--batch-size"
        )
    return numbers[0]
