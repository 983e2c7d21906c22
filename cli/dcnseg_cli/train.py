"""`dcnseg train`."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from dcnseg.config import (
    ARCHITECTURES,
    ATROUS_RATES_BY_STRIDE,
    CLASS_WEIGHTS,
    LOGGERS,
    LOSSES,
    OFFSET_LR_SCALES,
    OPTIMIZERS,
    PRESETS,
    REGION_HEADS,
    RESUMABLE_SETTINGS,
    DataConfig,
    ModelConfig,
    TrainConfig,
    dotted_names,
    flatten_settings,
    unflatten_settings,
)
from dcnseg.processes import this_process
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
from dcnseg_cli.reporting import Command, message, raise_if_signalled, report_errors

if TYPE_CHECKING:
    from dcnseg.engine.trainer import TrainResult

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
NEEDED = "pass DATA and --out RUN, or --resume RUN."
DEFAULT_PRESET = "default"
DOTTED_NAMES = {"data": "data.root"} | {k: v for k, v in dotted_names().items() if k != "root"}
RESUMABLE_OPTIONS = [name for name, dotted in DOTTED_NAMES.items() if dotted in RESUMABLE_SETTINGS]


class TrainCommand(TyperCommand):
    """Accepts the British spelling of an option, which earlier versions had."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command line."""
        return super().parse_args(ctx, [re.sub("^--colour-", "--color-", arg) for arg in args])


def _option(help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar)


PresetOption = Annotated[
    str,
    choice_option("Settings for a size of machine; other options override them.", tuple(PRESETS)),
]

# The options by panel of the help, in its order; types and defaults are those of the settings.
OPTIONS: Mapping[str | None, Mapping[str, Any]] = {
    None: {
        "init": _option(
            "Start from the trained weights of a run or weights file, including the decoder.",
            metavar="RUN_OR_FILE",
        ),
        "encoder": choice_option(
            "Encoder from segmentation-models-pytorch; the ResNet family works best.",
            ENCODERS,
            metavar="NAME",
        ),
        "epochs": _option("Number of epochs, at least 1."),
        "batch_size": _option(
            f"Images per batch, at least 2; {AUTO} finds the largest size that fits in memory.",
            metavar=f"N|{AUTO}",
        ),
        "crop_size": _option(
            "Size of random crops in pixels after --input-scale, at least 32.",
            metavar="SIZE|HEIGHT,WIDTH",
        ),
        "lr": _option("Peak learning rate, above 0."),
        "device": device_option(None),
    },
    DATA_PANEL: {
        "images": ImagesPatternOption,
        "masks": MasksPatternOption,
        "pairs": PairsOption,
        "val_fraction": _option(
            "Fraction used for validation if DATA has no val split, between 0 and 1."
        ),
        "ignore_index": IgnoreIndexOption,
        "mask_threshold": _option(
            "Treat mask values of at least this threshold as foreground; 0: masks contain class "
            "ids."
        ),
        "input_scale": _option("Resize images by this factor, in predictions too; at most 4."),
        "cache": _option("Keep decoded training images in memory.", "--cache/--no-cache"),
    },
    "Augmentation": {
        "scale_range": _option("Range of the random scale factor.", metavar="LOW,HIGH"),
        "flip": _option("Flip images horizontally at random."),
        "vertical_flip": _option("Flip images vertically at random.", "--vertical-flip"),
        "rotate": _option(
            "Random rotation: 90 or 180 rotates by multiples of this angle without interpolation, "
            "any other value by an angle between -DEGREES and DEGREES; 0: off.",
            metavar="DEGREES",
        ),
        "color_jitter": _option("Strength of random color changes, 0 to 1."),
        "blur": _option(
            "Blur half of the images with a random sigma up to this value, at most 10; 0: off.",
            metavar="PIXELS",
        ),
    },
    "Model": {
        "architecture": choice_option(
            "Architecture of the decoder; plain: only a 1x1 convolution, without ASPP.",
            ARCHITECTURES,
            "--architecture",
            "--decoder",
        ),
        "encoder_weights": _option(
            "imagenet, none, another weights name that segmentation-models-pytorch provides for "
            "the encoder, or a local file."
        ),
        "encoder_depth": _option(
            "Number of stages of the encoder, 3 to 5; 3: a small network with output stride 8."
        ),
        "output_stride": choice_option("Output stride of the encoder.", STRIDES),
        "deform_layers": _option(
            "Number of deformable 3x3 convolutions, counted from the end of the encoder; 0: none."
        ),
        "late_dilation": _option(
            "Dilation of the last three 3x3 convolutions; 0: set by the output stride."
        ),
        "modulated": _option("Use modulated deformable convolution (DCNv2).", "--modulated"),
        "offset_groups": _option("Number of offset groups, at least 1."),
        "decoder_channels": _option("Channels of the ASPP and the decoder, at least 1."),
        "atrous_rates": _option(
            "Three atrous rates of the ASPP; empty: those of the paper for the output stride."
        ),
    },
    "Regions": {
        "region_head": choice_option(
            "Also classify regions, the connected components of the label map; rfcn: without "
            "offsets.",
            REGION_HEADS,
        ),
        "region_bins": _option("Bins of a region along each axis, 1 to 14."),
        "region_min_area": _option(
            "Smallest area of a region in pixels of the network input, at least 1."
        ),
        "region_weight": _option("Weight of the loss of the regions, at least 0."),
        "region_ohem": _option(
            "Learn only from the half of the regions with the largest loss.", "--region-ohem"
        ),
    },
    "Learning": {
        "accumulate": _option("Batches per optimizer step (gradient accumulation), at least 1."),
        "optimizer": choice_option("Optimizer.", OPTIMIZERS),
        "offset_lr_scale": _option(
            "Learning rate of the offset branches relative to --lr, at least 0; default: "
            + ", ".join(f"{scale:g} for {name}" for name, scale in OFFSET_LR_SCALES.items())
            + "."
        ),
        "weight_decay": _option(
            "Weight decay, not applied to biases and normalization, at least 0."
        ),
        "warmup_epochs": _option(
            "Warmup epochs, in which the learning rate rises linearly, at least 0."
        ),
        "poly_power": _option("Power of the polynomial learning rate schedule, at least 0."),
        "loss": choice_option("Loss function.", LOSSES),
        "class_weights": choice_option("Class weights by pixel frequency.", CLASS_WEIGHTS),
        "ema": _option(
            "Decay of the exponential moving average of the weights, such as 0.999; 0: off."
        ),
        "eval_every": _option("Validate every N epochs, at least 1."),
        "patience": _option("Stop after N epochs without improvement; 0: never."),
        "nan_patience": _option(
            "Stop after N consecutive steps with a non-finite loss or gradient, at least 1."
        ),
        "seed": _option("Random seed, 0 to 2^32 - 1."),
    },
    "Machine": {
        "amp": AmpOption,
        "workers": _option("Worker processes that load images; 0: load in the main process."),
    },
    "Output": {
        "overwrite": OverwriteOption,
        "tensorboard": _option("Also write TensorBoard events.", "--tensorboard"),
        "logger": choice_option("Also write the curves with this package.", LOGGERS),
        "checkpoint_minutes": _option(
            "Save a checkpoint every N minutes within an epoch; 0: only at the end of epochs."
        ),
        "checkpoint_epochs": _option("Save a checkpoint every N epochs, at least 1."),
    },
}


# The type and the default of each option.
TYPES_AND_DEFAULTS = {
    field.name: (hints[field.name], field.default)
    for config in (DataConfig, ModelConfig, TrainConfig)
    for hints in [get_type_hints(config)]
    for field in fields(config)
} | {
    "batch_size": (str, str(TrainConfig.batch_size)),
    "ignore_index": (list, None),
    "overwrite": (bool, False),
}


def _parameter(name: str, option: Any, panel: str | None) -> inspect.Parameter:
    kind, default = TYPES_AND_DEFAULTS[name]
    if isinstance(default, tuple):  # text with commas on the command line
        kind, default = str, comma_list(default)
    if isinstance(option, OptionInfo):  # else one that several commands share
        option.rich_help_panel = panel
        option = Annotated[kind, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=option)


def add_options(without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Replace `**settings` in the signature that Typer reads by OPTIONS, but for some names."""

    def add(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        *parameters, _settings = signature.parameters.values()
        for panel, options in OPTIONS.items():
            for name, option in options.items():
                if name not in without:
                    parameters.append(_parameter(name, option, panel))
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return add


@report_errors
@add_options()
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
    out: Annotated[Path | None, _option("Run folder to write.", "--out", "-o")] = None,
    preset: PresetOption = DEFAULT_PRESET,
    resume: Annotated[
        Path | None,
        _option(
            "Resume this run. Only these options can be changed: "
            + ", ".join(f"--{name.replace('_', '-')}" for name in RESUMABLE_OPTIONS)
            + "."
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Train a DeepLab with deformable convolutions on a folder of images and masks."""
    options, given = context.params, given_options(context)
    if resume is not None:
        _resume(resume, options, given)
        return
    if data is None or out is None:
        raise typer.BadParameter(NEEDED, param_hint="DATA / --out")
    config, sources = new_config(options, given)
    from dcnseg.engine import training
    from dcnseg.report.run_charts import keep_report
    from dcnseg_cli.training_display import training_display

    with _suggest_resume(out), training_display() as display, keep_report(out, display) as listener:
        result = training.train(
            config,
            out,
            sources=sources,
            overwrite=settings["overwrite"],
            has_auto_batch=settings["batch_size"] == AUTO,
            listener=listener,
        )
    _report(result)


def given_options(context: typer.Context) -> set[str]:
    """The names of the options that the command line has."""
    return {
        name
        for name in context.params
        if (source := context.get_parameter_source(name))
        and source.name not in ("DEFAULT", "DEFAULT_MAP")
    }


def new_config(options: Mapping[str, Any], given: set[str]) -> tuple[TrainConfig, dict[str, str]]:
    """The settings of a new run, and the source of each."""
    preset = options["preset"]
    if options["init"] is not None and "encoder_weights" in given:
        raise typer.BadParameter(
            "--init loads the encoder too; omit --encoder-weights.", param_hint="--init"
        )
    if preset not in PRESETS:
        raise typer.BadParameter(
            f"{preset!r} is not one of {', '.join(PRESETS)}.{did_you_mean(preset, PRESETS)}",
            param_hint="--preset",
        )
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
    if options["batch_size"] == AUTO:
        sources["batch_size"] = "command line, found by trying"
    return unflatten_settings(_settings(options) | from_preset), sources


def _resume(run: Path, options: Mapping[str, Any], given: set[str]) -> None:
    from dcnseg.engine import training
    from dcnseg.engine.run_folder import read_run
    from dcnseg.report.run_charts import keep_report
    from dcnseg_cli.training_display import training_display

    if given - set(RESUMABLE_OPTIONS) - {"resume"}:
        _refuse_changes(run, read_run(run).config, options, given)
    settings = _settings(options)
    changes = {
        DOTTED_NAMES[name]: settings[DOTTED_NAMES[name]]
        for name in given - {"resume"}
        if name in RESUMABLE_OPTIONS
    }
    with _suggest_resume(run), training_display() as display, keep_report(run, display) as listener:
        result = training.resume(run, changes=changes, listener=listener)
    _report(result)


@contextmanager
def _suggest_resume(run: Path) -> Iterator[None]:
    from dcnseg.checkpoint import RESUME_STATE

    try:
        yield
    except KeyboardInterrupt:
        if this_process().is_main and (run / RESUME_STATE).is_file():
            message(f"Resume with: dcnseg train --resume {shlex.quote(str(run))}")
        raise


def _report(result: TrainResult) -> None:
    from dcnseg_cli.training_report import report_training

    if this_process().is_main:
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
