"""The settings of every command as frozen dataclasses, checked once when they are made.

Only entry functions (`build_segmenter`, `train`, `Predictor`, ...) see a config; everything below
takes numbers. Defaults stand here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from dcnseg.errors import ConfigError

Config = TypeVar("Config")

ARCHITECTURES = ("deeplabv3plus", "deeplabv3")
OPTIMIZERS = ("sgd", "adamw")
LOSSES = ("ce", "ce+dice", "focal", "lovasz")
CLASS_WEIGHTS = ("none", "balanced", "sqrt")
AMP_MODES = ("auto", "off", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "mps")

# Chen et al. 2017, "Rethinking Atrous Convolution": the rates double when the stride halves.
ATROUS_RATES_BY_STRIDE = {16: (6, 12, 18), 8: (12, 24, 36)}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} is {value!r}; expected one of {', '.join(choices)}.")


def _require_at_least(name: str, value: float, least: float) -> None:
    _require(
        value >= least and math.isfinite(value), f"{name} is {value}; expected at least {least}."
    )


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def check_pair_source(images: str, masks: str, pairs: Path | None) -> None:
    """Raise a ConfigError unless two patterns with {stem}, a list of pairs, or nothing is given."""
    _require(
        bool(images) == bool(masks),
        f"--images is {images!r} and --masks is {masks!r}; give both patterns or none.",
    )
    _require(
        pairs is None or not images, "--pairs is a list; leave --images and --masks out with it."
    )
    for name, pattern in (("--images", images), ("--masks", masks)):
        _require(
            not pattern or "{stem}" in pattern,
            f"{name} is {pattern!r}; expected a pattern with {{stem}} for the common part of the "
            "names, such as 'images/{stem}.jpg'.",
        )


@dataclass(frozen=True)
class ModelConfig:
    """What is needed to rebuild the network before its weights are loaded."""

    architecture: str = "deeplabv3plus"
    encoder: str = "resnet50"
    output_stride: int = 16
    deform_layers: int = 3
    late_dilation: int = 0  # of the last three 3x3 convolutions; 0: as the output stride has it
    modulated: bool = False
    offset_groups: int = 1
    decoder_channels: int = 256
    atrous_rates: tuple[int, ...] = ()  # empty: the paper's rates for the output stride

    def __post_init__(self) -> None:
        """Check ranges and fill in the rates."""
        _require_choice("--architecture", self.architecture, ARCHITECTURES)
        _require(
            self.output_stride in ATROUS_RATES_BY_STRIDE,
            f"--output-stride is {self.output_stride}; expected 8 or 16.",
        )
        _require_at_least("--deform-layers", self.deform_layers, 0)
        _require_at_least("--late-dilation", self.late_dilation, 0)
        _require_at_least("--offset-groups", self.offset_groups, 1)
        _require_at_least("--decoder-channels", self.decoder_channels, 1)
        rates = tuple(self.atrous_rates) or ATROUS_RATES_BY_STRIDE[self.output_stride]
        _require(
            len(rates) == 3 and all(rate >= 1 for rate in rates),
            f"--atrous-rates is {','.join(map(str, rates))}; expected three numbers of at least 1.",
        )
        object.__setattr__(self, "atrous_rates", rates)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes network input; it belongs to the weights and is stored with them."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    input_scale: float = 1.0  # pictures are resized by this factor before the network

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(
            0 < self.input_scale <= 4,
            f"--input-scale is {self.input_scale}; expected above 0 and up to 4.",
        )
        _require(
            len(self.mean) == 3 and len(self.std) == 3 and all(s > 0 for s in self.std),
            "mean and std need three numbers each, std above 0.",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are varied for training."""

    root: Path
    val_fraction: float = 0.2
    ignore_index: tuple[int, ...] = ()
    mask_threshold: int = 0  # grey values from here on are the foreground; 0: masks hold ids
    input_scale: float = 1.0
    crop_size: tuple[int, ...] = (512, 512)  # height, width, after input_scale
    scale_range: tuple[float, ...] = (0.5, 2.0)
    flip: bool = True
    colour_jitter: float = 0.3
    workers: int = 2
    cache: bool = False
    images: str = ""  # patterns of the paths, with {stem} and maybe {split}; empty: recognised
    masks: str = ""
    pairs: Path | None = None  # a list of images and their masks, instead of patterns

    def __post_init__(self) -> None:
        """Check ranges; one crop size stands for a square."""
        check_pair_source(self.images, self.masks, self.pairs)
        _require(
            0 < self.val_fraction < 1,
            f"--val-fraction is {self.val_fraction}; expected between 0 and 1.",
        )
        crop = self.crop_size * 2 if len(self.crop_size) == 1 else self.crop_size
        _require(
            len(crop) == 2 and min(crop) >= 32,
            f"--crop-size is {_listed(crop)}; expected SIZE or HEIGHT,WIDTH, at least 32.",
        )
        object.__setattr__(self, "crop_size", crop)
        low_high = self.scale_range
        _require(
            len(low_high) == 2 and 0 < low_high[0] <= low_high[1] < math.inf,
            f"--scale-range is {_listed(low_high)}; expected LOW,HIGH with 0 < LOW <= HIGH.",
        )
        _require(
            0 <= self.colour_jitter <= 1,
            f"--colour-jitter is {self.colour_jitter}; expected between 0 and 1.",
        )
        _require_at_least("--workers", self.workers, 0)
        _require(
            0 <= self.mask_threshold <= 65535,
            f"--mask-threshold is {self.mask_threshold}; expected 0 (off) to 65535.",
        )


@dataclass(frozen=True)
class PredictConfig:
    """How a trained network is applied to a picture of any size."""

    window: int = 1024  # network input pixels; larger pictures are cut into overlapping windows
    overlap: float = 0.25  # share of the window
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_at_least("--window", self.window, 64)
        _require(
            0 <= self.overlap <= 0.75,
            f"--overlap is {self.overlap}; expected between 0 and 0.75.",
        )
        _require(
            bool(self.scales) and all(0 < scale <= 8 for scale in self.scales),
            f"--scales is {_listed(self.scales)}; expected factors above 0 and up to 8.",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run's result."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    encoder_weights: str = "imagenet"
    epochs: int = 60
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.01
    offset_lr_scale: float = 0.1
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
    checkpoint_minutes: float = 10.0  # 0: at the end of epochs only
    checkpoint_epochs: int = 1
    nan_patience: int = 10  # steps in a row whose loss or gradient is not finite

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_choice("--optimizer", self.optimizer, OPTIMIZERS)
        _require_choice("--loss", self.loss, LOSSES)
        _require_choice("--class-weights", self.class_weights, CLASS_WEIGHTS)
        _require_choice("--amp", self.amp, AMP_MODES)
        _require_choice("--device", self.device.split(":")[0], DEVICES)
        _require(
            self.batch_size >= 2,
            f"--batch-size is {self.batch_size}; expected at least 2: the ASPP's image pooling "
            "normalises over the batch, and one value has no variance. "
            "Use a smaller --crop-size with --batch-size 2 and --accumulate.",
        )
        for name in ("epochs", "accumulate", "eval_every", "nan_patience", "checkpoint_epochs"):
            _require_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        not_negative = ("offset_lr_scale", "weight_decay", "warmup_epochs", "poly_power", "seed")
        for name in (*not_negative, "patience", "checkpoint_minutes"):
            _require_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 0)
        _require(0 < self.lr < math.inf, f"--lr is {self.lr}; expected above 0.")
        _require(self.seed < 2**32, f"--seed is {self.seed}; expected below 2**32.")
        _require(0 <= self.ema < 1, f"--ema is {self.ema}; expected from 0 (off) to below 1.")


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain JSON values (paths as strings, tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    result = plain(asdict(config))
    assert isinstance(result, dict)
    return result


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Rebuild a config that `to_dict` wrote.

    Raises:
        ConfigError: a setting is unknown, missing, or out of its range.
    """
    hints = get_type_hints(kind)
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    _require(
        not unknown,
        f"{kind.__name__} does not know {', '.join(unknown)}; was it written by a newer dcnseg?",
    )
    try:
        return kind(**{name: _parse(hints[name], value) for name, value in values.items()})
    except TypeError as error:
        raise ConfigError(f"{kind.__name__} cannot be made from {dict(values)}: {error}") from error


def _parse(hint: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_dict(hint, value)
    if isinstance(value, list):
        return tuple(value)
    is_path = hint is Path or (hint == Path | None and value is not None)
    return Path(value) if is_path else value
