"""The settings of every command as frozen dataclasses, checked once when they are made.

Only entry functions (`build_segmenter`, `train`, `Predictor`, ...) see a config; everything below
takes numbers. Defaults stand here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from dcnseg.errors import short_repr
from dcnseg.validation import check_fields, did_you_mean, parse_fields, require_between
from dcnseg.validation import require as _require

Config = TypeVar("Config")

ARCHITECTURES = ("deeplabv3plus", "deeplabv3", "plain")
REGION_HEADS = ("none", "rfcn", "deformable-rfcn", "deformable-fc")
# Learning rate of the offset branches relative to that of the network. Dai et al. 2017 train them
# at the full rate with SGD. AdamW moves them by the full rate however small their gradient is.
OFFSET_LR_SCALES: Mapping[str, float] = {"sgd": 1.0, "adamw": 0.1}
OPTIMIZERS = tuple(OFFSET_LR_SCALES)
LOGGERS = ("none", "tensorboard", "wandb", "mlflow")
LOSSES = ("ce", "ce+dice", "focal", "lovasz")
CLASS_WEIGHTS = ("none", "balanced", "sqrt")
AMP_MODES = ("auto", "off", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")
EXPORT_SUFFIXES: Mapping[str, str] = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
EXPORT_INPUTS = ("uint8", "float")
EXPORT_OUTPUTS = ("labels", "probabilities", "logits")
MAX_ROTATION = 180  # degrees
MIN_BLUR, MAX_BLUR = 0.1, 10  # pixels

# Settings that go together, by the names that config.json uses ("model.encoder"). What is not here
# has its default.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Half-size images and a small encoder, for a CPU; those of the CamVid figure in the README.
    "small": {
        "model.encoder": "resnet18",
        "data.input_scale": 0.5,
        "data.crop_size": (176, 240),
        "data.scale_range": (0.75, 1.75),
        "data.cache": True,
        "data.workers": 0,
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.01,
        "class_weights": "sqrt",
        "ema": 0.99,
        "epochs": 50,
        "eval_every": 5,
    },
    "default": {},
    # A deep encoder, large crops and a long schedule, for a GPU.
    "large": {
        "model.encoder": "resnet101",
        "model.deform_layers": 6,
        "data.crop_size": (768, 768),
        "data.workers": 8,
        "epochs": 120,
        "warmup_epochs": 5.0,
        "ema": 0.999,
    },
}

# Settings that may change when a run is resumed, by the same dotted names.
RESUMABLE_SETTINGS: Final = (
    "epochs",
    "patience",
    "nan_patience",
    "checkpoint_minutes",
    "checkpoint_epochs",
    "device",
    "data.workers",
)
# Settings that a resume does not compare with the saved run: they do not affect the result, or the
# data and the weights are compared instead.
UNCOMPARED_SETTINGS: Final = (
    "data.root",
    "data.pairs",
    "data.cache",
    "init",
    "encoder_weights",
    "tensorboard",
    "logger",
)

# Chen et al. 2017, "Rethinking Atrous Convolution": the rates double when the stride halves.
ATROUS_RATES_BY_STRIDE = {16: (6, 12, 18), 8: (12, 24, 36)}

OVERLAY_OPACITY: Final = 0.5
GRADIENT_PIXELS: Final = 8  # of each class, whose effective receptive field is measured

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Far beyond what is of use; beyond them numbers no longer fit what torch and the system count with.
MAX_COUNT: Final = 10**9
MAX_DILATION: Final = 1024  # pixels of the last feature map
MAX_CHANNELS: Final = 4096
MAX_REGION_BINS: Final = 14
MAX_CROP: Final = 8192  # pixels of a side; two crops of that size take gigabytes
MAX_WORKERS: Final = 1024
MAX_BATCH: Final = 65536
MAX_RATE: Final = 1e30  # training names a loss that diverges; float32 ends at 3e38
MAX_FACTOR: Final = 1e6
MAX_ID: Final = 65535  # of a mask's value
MIN_SCALE: Final = 0.01  # of the sides of an image
MAX_INPUT_SCALE: Final = 4.0
MAX_SCALE: Final = 16.0  # at random, for training
# Colors are numbers from 0 to 1 before they are normalized, and small numbers afterwards.
MEAN_RANGE: Final = (-1000.0, 1000.0)
STD_RANGE: Final = (0.0001, 1000.0)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(
        value in choices,
        f"{name} is {short_repr(value)}; expected one of {', '.join(choices)}."
        f"{did_you_mean(value, choices)}",
    )


def _check(config: Any, name: str, is_valid: bool, expected: str) -> None:
    """Raise a ConfigError unless a setting is valid; `expected` describes the valid values."""
    value = getattr(config, name)
    shown = _listed(value) if isinstance(value, tuple) else short_repr(value)
    _require(is_valid, f"{_option(name)} is {shown}; expected {expected}.")


def _check_range(config: Any, least: float, most: float, *names: str) -> None:
    for name in names:
        require_between(_option(name), getattr(config, name), least, most)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{v:g}" if isinstance(v, float) else short_repr(v) for v in values[:10])


@dataclass(frozen=True)
class PairSource:
    """Where the images and masks of a data folder are; without any value the layout is detected.

    Attributes:
        images: Pattern of the image paths, with {stem} and optionally {split}.
        masks: Pattern of the mask paths.
        pairs: List of images and their masks, instead of patterns.

    Raises:
        ConfigError: One pattern is missing or has no {stem}, or patterns and a list are given.
    """

    images: str = ""
    masks: str = ""
    pairs: Path | None = None

    def __post_init__(self) -> None:
        """Check types, and which values go together."""
        check_fields(self)
        _require(
            bool(self.images) == bool(self.masks),
            f"--images is {short_repr(self.images)} and --masks is {short_repr(self.masks)}; give "
            "both patterns or neither.",
        )
        _require(
            self.pairs is None or not self.images,
            "--pairs cannot be combined with --images and --masks. Use one or the other.",
        )
        for name, pattern in (("--images", self.images), ("--masks", self.masks)):
            _require(
                not pattern or "{stem}" in pattern,
                f"{name} is {short_repr(pattern)}; expected a pattern with {{stem}} for the common "
                "part of the names, such as 'images/{stem}.jpg'.",
            )


@dataclass(frozen=True)
class ModelConfig:
    """What is needed to rebuild the network before its weights are loaded."""

    architecture: str = "deeplabv3plus"
    encoder: str = "resnet50"
    encoder_depth: int = 5  # stages; the feature map of the last one has at most stride 2**depth
    output_stride: int = 16
    deform_layers: int = 3
    late_dilation: int = 0  # of the last three 3x3 convolutions; 0: as the output stride has it
    modulated: bool = False
    offset_groups: int = 1
    decoder_channels: int = 256
    atrous_rates: tuple[int, ...] = ()  # empty: the paper's rates for the output stride
    region_head: str = "none"
    region_bins: int = 3  # k: a region is pooled in k x k bins
    region_min_area: int = 64  # pixels of the network input; a smaller component is no region

    def __post_init__(self) -> None:
        """Check types and ranges, and fill in the rates."""
        check_fields(self)
        _require_choice("--architecture", self.architecture, ARCHITECTURES)
        _require_choice("--region-head", self.region_head, REGION_HEADS)
        is_valid = self.output_stride in ATROUS_RATES_BY_STRIDE
        _check(self, "output_stride", is_valid, "8 or 16")
        _check_range(self, 3, 5, "encoder_depth")
        object.__setattr__(self, "output_stride", min(self.output_stride, 2**self.encoder_depth))
        _check_range(self, 0, MAX_COUNT, "deform_layers")
        _check_range(self, 0, MAX_DILATION, "late_dilation")
        _check_range(self, 1, MAX_REGION_BINS, "region_bins")
        _check_range(self, 1, MAX_COUNT, "region_min_area")
        _check_range(self, 1, MAX_CHANNELS, "offset_groups", "decoder_channels")
        rates = self.atrous_rates or ATROUS_RATES_BY_STRIDE[self.output_stride]
        object.__setattr__(self, "atrous_rates", rates)
        is_valid = len(rates) == 3 and all(1 <= rate <= MAX_DILATION for rate in rates)
        _check(self, "atrous_rates", is_valid, f"three numbers from 1 to {MAX_DILATION}")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes network input; it belongs to the weights and is stored with them."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    input_scale: float = 1.0  # images are resized by this factor before the network

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_fields(self)
        _check_range(self, MIN_SCALE, MAX_INPUT_SCALE, "input_scale")
        for name, values, (least, most) in (
            ("mean", self.mean, MEAN_RANGE),
            ("std", self.std, STD_RANGE),
        ):
            _require(
                all(least <= value <= most for value in values),
                f"{name} is {_listed(values)}; expected three numbers from {least} to {most}.",
            )


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are varied for training."""

    root: Path
    val_fraction: float = 0.2
    ignore_index: tuple[int, ...] = ()
    mask_threshold: int = 0  # gray values from here on are the foreground; 0: masks hold ids
    input_scale: float = 1.0
    crop_size: tuple[int, ...] = (512, 512)  # height, width, after input_scale
    scale_range: tuple[float, ...] = (0.5, 2.0)
    flip: bool = True
    vertical_flip: bool = False
    rotate: float = 0.0  # degrees: multiples of 90 or 180, or an angle up to another value
    color_jitter: float = 0.3
    blur: float = 0.0  # greatest sigma in pixels
    workers: int = 2
    cache: bool = False
    images: str = ""  # these three as in `PairSource`
    masks: str = ""
    pairs: Path | None = None

    def __post_init__(self) -> None:
        """Check types and ranges; one crop size stands for a square."""
        check_fields(self)
        _ = self.source  # checks it
        _check(
            self,
            "val_fraction",
            0 < self.val_fraction < 1,
            "above 0 and below 1. Training needs validation images: pass a fraction such as 0.2, "
            "or add a folder val next to train in DATA and omit this option",
        )
        crop = self.crop_size * 2 if len(self.crop_size) == 1 else self.crop_size
        object.__setattr__(self, "crop_size", crop)
        is_valid = len(crop) == 2 and 32 <= min(crop) <= max(crop) <= MAX_CROP
        expected = f"SIZE or HEIGHT,WIDTH, at least 32 and at most {MAX_CROP}"
        _check(self, "crop_size", is_valid, expected)
        scales = self.scale_range
        is_valid = len(scales) == 2 and MIN_SCALE <= scales[0] <= scales[1] <= MAX_SCALE
        expected = f"LOW,HIGH with {MIN_SCALE} <= LOW <= HIGH <= {MAX_SCALE}"
        _check(self, "scale_range", is_valid, expected)
        _check(self, "color_jitter", 0 <= self.color_jitter <= 1, "between 0 and 1")
        _check_range(self, 0, MAX_WORKERS, "workers")
        _check_range(self, MIN_SCALE, MAX_INPUT_SCALE, "input_scale")
        _check_range(self, 0, MAX_ROTATION, "rotate")
        _check_range(self, 0, MAX_BLUR, "blur")
        is_valid = not 0 < self.blur < MIN_BLUR
        _check(self, "blur", is_valid, f"0 (off), or at least {MIN_BLUR} pixels")
        _check(self, "mask_threshold", 0 <= self.mask_threshold <= MAX_ID, f"0 (off) to {MAX_ID}")
        is_valid = all(0 <= value <= MAX_ID for value in self.ignore_index)
        _check(self, "ignore_index", is_valid, f"values from 0 to {MAX_ID}")

    @property
    def source(self) -> PairSource:
        """Where the images and masks are."""
        return PairSource(self.images, self.masks, self.pairs)


@dataclass(frozen=True)
class PredictConfig:
    """How a trained network is applied to an image of any size."""

    window: int = 1024  # network input pixels; larger images are cut into overlapping windows
    overlap: float = 0.25  # share of the window
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    min_confidence: float = 0.0  # pixels whose class is less probable are ignored
    min_region_score: float = 0.0  # regions with a lower score get the class around them

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_fields(self)
        _check_range(self, 64, 2**20, "window")
        _check_range(self, 0, 1, "min_confidence", "min_region_score")
        _check(self, "overlap", 0 <= self.overlap <= 0.75, "between 0 and 0.75")
        is_valid = bool(self.scales) and all(MIN_SCALE <= scale <= 8 for scale in self.scales)
        _check(self, "scales", is_valid, f"factors from {MIN_SCALE} to 8")


@dataclass(frozen=True)
class ExportConfig:
    """What an exported model takes and returns."""

    format: str = "onnx"
    input: str = "uint8"  # "float": normalized images at network resolution
    outputs: tuple[str, ...] = ("labels", "logits")  # in this order

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_fields(self)
        _require_choice("--format", self.format, tuple(EXPORT_SUFFIXES))
        _require_choice("--input", self.input, EXPORT_INPUTS)
        for output in self.outputs:
            _require_choice("--output", output, EXPORT_OUTPUTS)
        _require(
            0 < len(self.outputs) == len(set(self.outputs)),
            f"--output is {','.join(self.outputs)!r}; expected one or more of "
            f"{', '.join(EXPORT_OUTPUTS)}, each once.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run's result."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    init: Path | None = None  # a run or weights file to start from, instead of encoder_weights
    encoder_weights: str = "imagenet"
    epochs: int = 60
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.01
    offset_lr_scale: float | None = None  # of lr; None: that of OFFSET_LR_SCALES
    weight_decay: float = 1e-4
    warmup_epochs: float = 1.0
    poly_power: float = 0.9
    loss: str = "ce"
    class_weights: str = "none"
    amp: str = "auto"
    ema: float = 0.0
    patience: int = 0
    eval_every: int = 1
    seed: int = 0
    device: str = "auto"
    tensorboard: bool = False
    logger: str = "none"
    checkpoint_minutes: float = 10.0  # 0: at the end of epochs only
    checkpoint_epochs: int = 1
    nan_patience: int = 10  # steps in a row whose loss or gradient is not finite
    region_weight: float = 1.0  # of the region head's loss
    region_ohem: bool = False  # learn from the regions with the largest loss
    augment: str = ""  # name of the augmentation that `train` was given from Python

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_fields(self)
        _require_choice("--optimizer", self.optimizer, OPTIMIZERS)
        _require_choice("--loss", self.loss, LOSSES)
        _require_choice("--class-weights", self.class_weights, CLASS_WEIGHTS)
        _require_choice("--logger", self.logger, LOGGERS)
        _require_choice("--amp", self.amp, AMP_MODES)
        _require_choice("--device", self.device.split(":")[0], DEVICES)
        _check(
            self,
            "batch_size",
            self.batch_size >= 2,
            "at least 2: the ASPP's image pooling normalizes over the batch, and one value has no "
            "variance. Use a smaller --crop-size with --batch-size 2 and --accumulate",
        )
        _check_range(self, 2, MAX_BATCH, "batch_size")
        _check_range(self, 1, MAX_COUNT, "epochs", "accumulate", "eval_every", "nan_patience")
        _check_range(self, 1, MAX_COUNT, "checkpoint_epochs")
        _check_range(self, 0, MAX_COUNT, "warmup_epochs", "patience", "checkpoint_minutes")
        _check_range(self, 0, MAX_FACTOR, "weight_decay", "poly_power")
        if self.offset_lr_scale is not None:
            _check_range(self, 0, MAX_FACTOR, "offset_lr_scale")
        _check_range(self, 0, MAX_FACTOR, "region_weight")
        _check(self, "lr", 0 < self.lr <= MAX_RATE, f"above 0 and at most {MAX_RATE}")
        _check(self, "seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        _check(self, "ema", 0 <= self.ema < 1, "from 0 (off) to below 1")

    @property
    def offset_lr(self) -> float:
        """Peak learning rate of the offset branches."""
        scale = self.offset_lr_scale
        return self.lr * (OFFSET_LR_SCALES[self.optimizer] if scale is None else scale)


def dotted_names() -> dict[str, str]:
    """The dotted name of every setting by its own: "data.crop_size" by "crop_size"."""
    parts = {"data": DataConfig, "model": ModelConfig}
    nested = {f.name: f"{part}.{f.name}" for part, kind in parts.items() for f in fields(kind)}
    return {f.name: f.name for f in fields(TrainConfig) if f.name not in parts} | nested


def make_train_config(settings: Mapping[str, Any], preset: str = "default") -> TrainConfig:
    """Build a TrainConfig from settings by name, such as `{"root": "photos", "crop_size": 256}`.

    Lists stand for tuples, text for paths, and a number for a tuple of one.

    Args:
        settings: The settings that differ from those of the preset.
        preset: A name in PRESETS.

    Raises:
        ConfigError: A setting or the preset is unknown, or a value has a wrong type or range.
    """
    _require_choice("--preset", preset, tuple(PRESETS))
    dotted = dotted_names()
    for name in settings:
        hint = did_you_mean(name, dotted)
        _require(name in dotted, f"{short_repr(name)} is not a setting of training.{hint}")
    given = {dotted[name]: value for name, value in settings.items()}
    return unflatten_settings({**PRESETS[preset], **given})


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Make the paths absolute, so that a run or comparison can be resumed from any folder."""
    data, weights = config.data, config.encoder_weights
    return replace(
        config,
        data=replace(data, root=data.root.resolve(), pairs=data.pairs and data.pairs.resolve()),
        init=config.init and config.init.resolve(),
        encoder_weights=str(Path(weights).resolve()) if Path(weights).is_file() else weights,
    )


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain JSON values (paths as strings, tuples as lists)."""
    return dict(json.loads(json.dumps(asdict(config), default=str)))


def from_dict(kind: type[Config], values: Any) -> Config:
    """Rebuild a config that `to_dict` wrote.

    Raises:
        ConfigError: a setting is unknown, missing, of a wrong type, or out of its range.
    """
    return parse_fields(kind, values)


def flatten_settings(config: Any) -> dict[str, Any]:
    """Each setting of a config by its dotted name, such as "lr" or "model.encoder"."""
    flat: dict[str, Any] = {}
    for name, value in vars(config).items():
        if is_dataclass(value):
            flat |= {f"{name}.{key}": item for key, item in flatten_settings(value).items()}
        else:
            flat[name] = value
    return flat


def unflatten_settings(settings: Mapping[str, Any]) -> TrainConfig:
    """Build the TrainConfig that `flatten_settings` took apart; missing settings get defaults.

    Raises:
        ConfigError: as `from_dict`.
    """
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        part, _, key = name.rpartition(".")
        (nested.setdefault(part, {}) if part else nested)[key] = value
    return from_dict(TrainConfig, nested)
