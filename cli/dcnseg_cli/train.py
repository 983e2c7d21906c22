"""`dcnseg train`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from dcnseg.config import (
    ARCHITECTURES,
    ATROUS_RATES_BY_STRIDE,
    CLASS_WEIGHTS,
    LOSSES,
    OPTIMIZERS,
    PRESETS,
    DataConfig,
    ModelConfig,
    TrainConfig,
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

# Where each option's value lives in TrainConfig, if not in itself.
SETTING_OF_OPTION = {
    **{field.name: f"data.{field.name}" for field in fields(DataConfig)},
    **{field.name: f"model.{field.name}" for field in fields(ModelConfig)},
    "data": "data.root",
}
STRIDES = tuple(map(str, sorted(ATROUS_RATES_BY_STRIDE)))
AUTO = "auto"
DEFAULT_PRESET = "default"
NOT_SETTINGS = {"out", "resume", "overwrite", "preset"}
# What may change when a run goes on; all other options must be as they were.
RESUME_OPTIONS = (
    "epochs",
    "patience",
    "nan_patience",
    "checkpoint_minutes",
    "checkpoint_epochs",
    "device",
    "workers",
)


def _option(help_text: str, panel: str | None, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar)


@report_errors
def train(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DATA]",
            help="Folder with train/images and train/masks (and val, test), images and masks, or "
            "another usual layout.",
        ),
    ] = None,
    out: Annotated[Path | None, _option("The run folder to write.", None, "--out", "-o")] = None,
    preset: Annotated[
        str,
        choice_option(
            "Settings for a size of machine (docs/training.md); options given beside it win.",
            tuple(PRESETS),
        ),
    ] = DEFAULT_PRESET,
    resume: Annotated[
        Path | None,
        _option(
            "Go on with this run. May change: "
            + ", ".join(f"--{name.replace('_', '-')}" for name in RESUME_OPTIONS)
            + ".",
            None,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        _option(
            "Start from a run's or file's trained weights, decoder included.",
            None,
            metavar="RUN_OR_FILE",
        ),
    ] = TrainConfig.init,
    encoder: Annotated[
        str,
        choice_option(
            "An encoder of segmentation-models-pytorch; the ResNet family fits best.",
            ENCODERS,
            metavar="NAME",
        ),
    ] = ModelConfig.encoder,
    epochs: Annotated[int, _option("Passes over the images, from 1.", None)] = TrainConfig.epochs,
    batch_size: Annotated[
        str,
        _option(
            f"Images per batch, at least 2, or {AUTO}: as many as memory holds.",
            None,
            metavar=f"N|{AUTO}",
        ),
    ] = str(TrainConfig.batch_size),
    crop_size: Annotated[
        str,
        _option(
            "Size of the random crops in resized pixels, from 32.",
            None,
            metavar="SIZE|HEIGHT,WIDTH",
        ),
    ] = comma_list(DataConfig.crop_size),
    lr: Annotated[float, _option("Highest learning rate, above 0.", None)] = TrainConfig.lr,
    device: Annotated[str, device_option(None)] = TrainConfig.device,
    images: ImagesPatternOption = DataConfig.images,
    masks: MasksPatternOption = DataConfig.masks,
    pairs: PairsOption = DataConfig.pairs,
    val_fraction: Annotated[
        float, _option("Share kept for validation where DATA has no val folder, 0..1.", DATA_PANEL)
    ] = DataConfig.val_fraction,
    ignore_index: IgnoreIndexOption = None,
    mask_threshold: Annotated[
        int,
        _option("Gray mask values from here on are the foreground; 0: masks hold ids.", DATA_PANEL),
    ] = DataConfig.mask_threshold,
    input_scale: Annotated[
        float, _option("Resize images by this factor, for predictions too; up to 4.", DATA_PANEL)
    ] = DataConfig.input_scale,
    cache: Annotated[
        bool,
        _option("Keep the decoded training images in memory.", DATA_PANEL, "--cache/--no-cache"),
    ] = DataConfig.cache,
    scale_range: Annotated[
        str,
        _option("The random scale, factors above 0.", AUGMENTATION_PANEL, metavar="LOW,HIGH"),
    ] = comma_list(DataConfig.scale_range),
    flip: Annotated[
        bool, _option("Mirror images left to right at random.", AUGMENTATION_PANEL)
    ] = DataConfig.flip,
    vertical_flip: Annotated[
        bool,
        _option("Mirror images top to bottom at random.", AUGMENTATION_PANEL, "--vertical-flip"),
    ] = DataConfig.vertical_flip,
    rotate: Annotated[
        float,
        _option(
            "Rotate at random: 90 and 180 by multiples of it, without interpolation; "
            "another value by any angle of at most as much either way, up to 180; 0: off.",
            AUGMENTATION_PANEL,
            metavar="DEGREES",
        ),
    ] = DataConfig.rotate,
    color_jitter: Annotated[
        float, _option("Strength of random color changes, 0..1.", AUGMENTATION_PANEL)
    ] = DataConfig.color_jitter,
    blur: Annotated[
        float,
        _option(
            "Blur every other image, with a random sigma of at most as many pixels, up to 10; "
            "0: off.",
            AUGMENTATION_PANEL,
            metavar="PIXELS",
        ),
    ] = DataConfig.blur,
    architecture: Annotated[
        str, choice_option("The decoder.", ARCHITECTURES, MODEL_PANEL)
    ] = ModelConfig.architecture,
    encoder_weights: Annotated[
        str, _option("imagenet, none, another name of smp's, or a local file.", MODEL_PANEL)
    ] = TrainConfig.encoder_weights,
    output_stride: Annotated[
        int,
        choice_option("Stride of the encoder's last features.", STRIDES, MODEL_PANEL),
    ] = ModelConfig.output_stride,
    deform_layers: Annotated[
        int, _option("How many of the last 3x3 convolutions are deformable; 0: none.", MODEL_PANEL)
    ] = ModelConfig.deform_layers,
    late_dilation: Annotated[
        int,
        _option(
            "Dilation of the last three 3x3 convolutions; 0: as the output stride has it.",
            MODEL_PANEL,
        ),
    ] = ModelConfig.late_dilation,
    modulated: Annotated[
        bool, _option("Modulated deformable convolution (v2).", MODEL_PANEL, "--modulated")
    ] = ModelConfig.modulated,
    offset_groups: Annotated[
        int, _option("Groups of channels with offsets of their own, from 1.", MODEL_PANEL)
    ] = ModelConfig.offset_groups,
    decoder_channels: Annotated[
        int, _option("Channels of the ASPP and the decoder, from 1.", MODEL_PANEL)
    ] = ModelConfig.decoder_channels,
    atrous_rates: Annotated[
        str, _option("Three rates of the ASPP in feature pixels; empty: the paper's.", MODEL_PANEL)
    ] = comma_list(ModelConfig.atrous_rates),
    accumulate: Annotated[
        int, _option("Batches per step of the optimizer, from 1.", LEARNING_PANEL)
    ] = TrainConfig.accumulate,
    optimizer: Annotated[
        str, choice_option("The optimizer.", OPTIMIZERS, LEARNING_PANEL)
    ] = TrainConfig.optimizer,
    offset_lr_scale: Annotated[
        float,
        _option("Learning rate of the offset branches relative to --lr, from 0.", LEARNING_PANEL),
    ] = TrainConfig.offset_lr_scale,
    weight_decay: Annotated[
        float, _option("Weight decay of all but biases and normalization, from 0.", LEARNING_PANEL)
    ] = TrainConfig.weight_decay,
    warmup_epochs: Annotated[
        float, _option("Epochs over which the rate rises, from 0.", LEARNING_PANEL)
    ] = TrainConfig.warmup_epochs,
    poly_power: Annotated[
        float, _option("Power of the poly schedule, from 0.", LEARNING_PANEL)
    ] = TrainConfig.poly_power,
    loss: Annotated[str, choice_option("The loss.", LOSSES, LEARNING_PANEL)] = TrainConfig.loss,
    class_weights: Annotated[
        str,
        choice_option("Weights for rare classes, by their pixels.", CLASS_WEIGHTS, LEARNING_PANEL),
    ] = TrainConfig.class_weights,
    ema: Annotated[
        float,
        _option(
            "Decay of the weights' moving average, e.g. 0.999, below 1; 0: off.", LEARNING_PANEL
        ),
    ] = TrainConfig.ema,
    eval_every: Annotated[
        int, _option("Epochs between evaluations, from 1.", LEARNING_PANEL)
    ] = TrainConfig.eval_every,
    patience: Annotated[
        int, _option("Stop after so many epochs without a better score; 0: never.", LEARNING_PANEL)
    ] = TrainConfig.patience,
    nan_patience: Annotated[
        int,
        _option(
            "Stop after so many steps in a row whose loss is not finite, from 1.", LEARNING_PANEL
        ),
    ] = TrainConfig.nan_patience,
    seed: Annotated[
        int, _option("Of everything random, 0 to 2^32 - 1.", LEARNING_PANEL)
    ] = TrainConfig.seed,
    amp: AmpOption = TrainConfig.amp,
    workers: Annotated[
        int, _option("Processes that load images; 0: the main one.", MACHINE_PANEL)
    ] = DataConfig.workers,
    overwrite: OverwriteOption = False,
    tensorboard: Annotated[
        bool, _option("Write TensorBoard events too.", OUTPUT_PANEL, "--tensorboard")
    ] = TrainConfig.tensorboard,
    checkpoint_minutes: Annotated[
        float,
        _option(
            "Save the state so often within an epoch; 0: at the end of epochs only.", OUTPUT_PANEL
        ),
    ] = TrainConfig.checkpoint_minutes,
    checkpoint_epochs: Annotated[
        int,
        _option("Save the state at the end of every so many epochs, from 1.", OUTPUT_PANEL),
    ] = TrainConfig.checkpoint_epochs,
) -> None:
    """Train a DeepLab with deformable convolutions on a folder of images and masks."""
    options = {name: value for name, value in locals().items() if name != "context"}
    given = _given_options(context)
    if resume is not None:
        _resume(options, given)
        return
    if data is None or out is None:
        raise typer.BadParameter(
            "give DATA and --out RUN, or --resume RUN.", param_hint="DATA / --out"
        )
    if init is not None and "encoder_weights" in given:
        raise typer.BadParameter(
            "--init loads the encoder too; leave --encoder-weights out.", param_hint="--init"
        )
    chosen = _preset_settings(preset, given)
    config = _build_config(options, chosen)
    sources = _sources(options, given) | dict.fromkeys(chosen, f"preset {preset}")
    has_auto_batch = options["batch_size"] == AUTO
    if has_auto_batch:
        sources["batch_size"] = "command line, found by trying"
    from dcnseg.engine import training
    from dcnseg_cli.training_display import training_display

    with _suggest_resume(out), training_display() as listener:
        result = training.train(
            config,
            out,
            sources=sources,
            overwrite=overwrite,
            has_auto_batch=has_auto_batch,
            listener=listener,
        )
    _report(result)


def _resume(options: dict[str, Any], given: set[str]) -> None:
    from dcnseg.engine import training
    from dcnseg_cli.training_display import training_display

    run = options["resume"]
    _refuse_changes(run, options, given)
    changes = {_setting(name): options[name] for name in RESUME_OPTIONS if name in given}
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
            message(f"Go on with: dcnseg train --resume {shlex.quote(str(run))}")
        raise


def _report(result: Any) -> None:
    from dcnseg_cli.training_report import report_training

    report_training(result)
    raise_if_signalled()  # one that came when nothing was left to do


def _given_options(context: typer.Context) -> set[str]:
    given = set()
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP"):
            given.add(name)
    return given


def _refuse_changes(run: Path, options: dict[str, Any], given: set[str]) -> None:
    """Refuse options that say something else than the run's config.json does."""
    from dcnseg.config import to_dict
    from dcnseg.engine.run_folder import read_run

    if not given - set(RESUME_OPTIONS) - {"resume"}:
        return
    config = read_run(run).config
    data = options["data"] or config.data.root
    paths = {name: options[name] and options[name].resolve() for name in ("pairs", "init")}
    now = to_dict(_build_config(options | {"data": data.resolve()} | paths))
    before = to_dict(config)
    differences = []
    for name in sorted(given - set(RESUME_OPTIONS) - NOT_SETTINGS):
        part, _, field = _setting(name).rpartition(".")
        values = [(settings[part] if part else settings)[field] for settings in (now, before)]
        if values[0] != values[1]:
            option = "DATA" if name == "data" else f"--{name.replace('_', '-')}"
            differences.append(f"{option} is {values[0]}, the run has {values[1]}")
    if "out" in given and options["out"].resolve() != run.resolve():
        differences.append(f"--out is {options['out']}, the run is {run}")
    if "overwrite" in given:
        differences.append("--overwrite would delete the run")
    if "preset" in given:
        differences.append(f"--preset {options['preset']} is for a new run")
    if differences:
        raise typer.BadParameter(
            f"{'; '.join(differences)}. These cannot be changed when a run goes on.",
            param_hint="--resume",
        )


def _setting(option: str) -> str:
    return SETTING_OF_OPTION.get(option, option)


def _preset_settings(preset: str, given: set[str]) -> Mapping[str, Any]:
    """The settings of a preset, but for those that have an option on the command line."""
    if preset not in PRESETS:
        raise typer.BadParameter(
            f"{preset!r} is none of {', '.join(PRESETS)}.{did_you_mean(preset, PRESETS)}",
            param_hint="--preset",
        )
    own = {_setting(name) for name in given}
    return {name: value for name, value in PRESETS[preset].items() if name not in own}


def _sources(options: dict[str, Any], given: set[str]) -> dict[str, str]:
    return {
        _setting(name): "command line" if name in given else "default"
        for name in options
        if name not in NOT_SETTINGS
    }


def _parse_batch_size(text: str) -> int:
    """The number, or the default where it will be found by trying."""
    if text == AUTO:
        return TrainConfig.batch_size
    numbers = parse_integers(text, "--batch-size")
    if len(numbers) != 1:
        raise typer.BadParameter(
            f"{text!r} is not a whole number or {AUTO}.", param_hint="--batch-size"
        )
    return numbers[0]


def _build_config(options: dict[str, Any], chosen: Mapping[str, Any] | None = None) -> TrainConfig:
    """All settings: those of the options, replaced by the `chosen` ones of a preset."""
    values = options | {
        "ignore_index": parse_ignore_index(options["ignore_index"]),
        "crop_size": parse_integers(options["crop_size"], "--crop-size"),
        "scale_range": parse_numbers(options["scale_range"], "--scale-range"),
        "atrous_rates": parse_integers(options["atrous_rates"], "--atrous-rates"),
        "batch_size": _parse_batch_size(options["batch_size"]),
    }
    settings = {_setting(name): values[name] for name in values if name not in NOT_SETTINGS}
    parts: dict[str, dict[str, Any]] = {"data": {}, "model": {}, "": {}}
    for setting, value in (settings | dict(chosen or {})).items():
        part, _, name = setting.rpartition(".")
        parts[part][name] = value
    return TrainConfig(
        data=DataConfig(**parts["data"]), model=ModelConfig(**parts["model"]), **parts[""]
    )
