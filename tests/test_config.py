from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dcnseg.config import (
    RESUMABLE_SETTINGS,
    UNCOMPARED_SETTINGS,
    DataConfig,
    ModelConfig,
    PairSource,
    PredictConfig,
    Preprocessing,
    TrainConfig,
    flatten_settings,
    from_dict,
    to_dict,
    unflatten_settings,
)
from dcnseg.errors import ConfigError
from tests.garbage import JSON_GARBAGE, garbled

DATA = partial(DataConfig, Path("photos"))
TRAIN = partial(TrainConfig, DATA())


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(architecture="deeplabv3", output_stride=8, atrous_rates=(2, 4, 6)),
        ModelConfig(region_head="deformable-fc", region_bins=7, region_min_area=9),
        Preprocessing(input_scale=0.5),
        PredictConfig(scales=(0.5, 1.0), flip=True),
        TrainConfig(DATA(ignore_index=(11, 0), crop_size=(64, 96))),
        DATA(images="i/{stem}", masks="m/{stem}"),
        DATA(pairs=Path("list.csv")),
    ],
)
def test_round_trip(config: Any) -> None:
    assert from_dict(type(config), to_dict(config)) == config


def test_dotted_names_round_trip() -> None:
    data = DATA(crop_size=(64, 96), pairs=Path("pairs.csv"))
    config = TrainConfig(data, ModelConfig(encoder="resnet18", atrous_rates=(2, 4, 6)), lr=0.5)
    flat = flatten_settings(config)
    assert flat["model.encoder"] == "resnet18"
    assert flat["data.crop_size"] == (64, 96)
    assert {*RESUMABLE_SETTINGS, *UNCOMPARED_SETTINGS} < set(flat)
    assert unflatten_settings(flat) == config
    assert unflatten_settings({"data.root": Path("a"), "lr": 1.0}).model == ModelConfig()
    with pytest.raises(ConfigError, match="unknown field 'nonsense' in the data settings"):
        unflatten_settings(flat | {"data.nonsense": 1})


def test_offset_branches_have_the_full_rate_with_sgd_only() -> None:
    assert TRAIN(optimizer="sgd", lr=0.5).offset_lr == 0.5
    assert TRAIN(optimizer="adamw", lr=0.5).offset_lr == pytest.approx(0.05)
    assert TRAIN(optimizer="adamw", lr=0.5, offset_lr_scale=0).offset_lr == 0


def test_rates_follow_the_output_stride() -> None:
    assert ModelConfig(output_stride=16).atrous_rates == (6, 12, 18)
    assert ModelConfig(output_stride=8).atrous_rates == (12, 24, 36)


def test_one_crop_size_is_a_square() -> None:
    assert DataConfig(Path("x"), crop_size=(96,)).crop_size == (96, 96)


@pytest.mark.parametrize(
    ("kind", "settings", "text"),
    [
        (ModelConfig, {"output_stride": 32}, r"--output-stride is 32; expected 8 or 16"),
        (ModelConfig, {"deform_layers": -1}, r"--deform-layers is -1; expected at least 0"),
        (ModelConfig, {"architecture": "unet"}, r"--architecture is 'unet'; expected one of"),
        (ModelConfig, {"atrous_rates": (1, 2)}, r"--atrous-rates is 1,2; expected three"),
        (ModelConfig, {"offset_groups": 0}, r"--offset-groups is 0"),
        (ModelConfig, {"region_head": "fc"}, r"--region-head is 'fc'; expected one of none, rfcn,"),
        (ModelConfig, {"region_bins": 0}, r"--region-bins is 0; expected at least 1"),
        (ModelConfig, {"region_bins": 15}, r"--region-bins is 15; expected .*at most 14"),
        (ModelConfig, {"region_min_area": 0}, r"--region-min-area is 0; expected at least 1"),
        (TRAIN, {"region_weight": -0.5}, r"--region-weight is -0.5; expected at least 0"),
        (TRAIN, {"region_weight": math.nan}, r"--region-weight is nan"),
        (TRAIN, {"region_ohem": 1}, r"--region-ohem is 1"),
        (Preprocessing, {"input_scale": 0}, r"is 0; expected at least 0.01 and at most 4"),
        (Preprocessing, {"mean": (0, 0, math.nan)}, "mean is 0,0,nan; expected three numbers from"),
        (Preprocessing, {"mean": (0, 0, 1e308)}, r"mean is 0,0,1e\+308; expected"),
        (Preprocessing, {"std": (1, 1, math.inf)}, "std is 1,1,inf; .* from 0.0001 to 1000"),
        (Preprocessing, {"std": (1, 1, 1e-300)}, r"std is 1,1,1e-300; expected"),
        (Preprocessing, {"std": (1, 1, -1)}, r"std is 1,1,-1; expected"),
        (Preprocessing, {"mean": "abc"}, r"mean is 'abc'; expected 3 numbers"),
        (Preprocessing, {"std": (1, 1)}, r"std is \(1, 1\); expected 3 numbers"),
        (PredictConfig, {"window": 10}, r"--window is 10; expected at least 64"),
        (PredictConfig, {"overlap": 0.9}, r"--overlap is 0.9"),
        (PredictConfig, {"scales": ()}, r"--scales is ; expected"),
        (TRAIN, {"batch_size": 1}, r"--batch-size is 1; expected at least 2.*ASPP"),
        (TRAIN, {"lr": 0}, r"--lr is 0; expected above 0"),
        (TRAIN, {"ema": 1.0}, r"--ema is 1.0"),
        (TRAIN, {"lr": float("inf")}, r"--lr is inf"),
        (TRAIN, {"poly_power": float("nan")}, r"--poly-power is nan"),
        (TRAIN, {"seed": 10**30}, r"--seed is 10+; expected 0 to"),
        (TRAIN, {"epochs": 0}, r"--epochs is 0; expected at least 1"),
        (TRAIN, {"offset_lr_scale": "x"}, r"--offset-lr-scale is 'x'; expected a number or none"),
        (TRAIN, {"offset_lr_scale": -1}, r"--offset-lr-scale is -1; expected at least 0"),
        (TRAIN, {"loss": "l2"}, r"--loss is 'l2'; expected one of ce, ce\+dice, focal, lovasz"),
        (TRAIN, {"device": "tpu"}, r"--device is 'tpu'"),
        (DATA, {"crop_size": (16, 16)}, r"--crop-size is 16,16; expected"),
        (DATA, {"scale_range": (2.0, 1.0)}, r"--scale-range is 2,1; expected"),
        (DATA, {"val_fraction": 1.0}, r"--val-fraction is 1.0"),
        (DATA, {"workers": -1}, r"--workers is -1"),
        (DATA, {"color_jitter": 2}, r"--color-jitter is 2"),
        (DATA, {"images": "i/{stem}"}, r"--images is 'i/{stem}' and --masks is ''; give both"),
        (DATA, {"images": "i", "masks": "{stem}"}, r"'i'; expected a pattern with {stem}"),
        (
            DATA,
            {"images": "{stem}", "masks": "{stem}_L", "pairs": Path("a.csv")},
            r"--pairs cannot be combined with --images and --masks",
        ),
    ],
)
def test_values_out_of_range_are_named(kind: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        kind(**settings)


def test_where_the_images_are_may_be_missing() -> None:
    old = to_dict(DATA())
    for name in ("images", "masks", "pairs"):
        del old[name]
    assert from_dict(DataConfig, old) == DATA()
    assert DATA(pairs=Path("list.csv")).source == PairSource(pairs=Path("list.csv"))


CONFIGS = (ModelConfig(), Preprocessing(), PredictConfig(), DATA(), TRAIN())
NO_USE = (10**400, -(10**400), 2**120, math.nan, math.inf, -math.inf, 1e308, -1e308)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_place_of_the_settings_refuses_what_it_cannot_be(config: Any) -> None:
    """What is not refused is a config that comes back from its JSON."""
    for _, values in garbled(to_dict(config), JSON_GARBAGE):
        with suppress(ConfigError):
            changed = from_dict(type(config), values)
            assert from_dict(type(config), json.loads(json.dumps(to_dict(changed)))) == changed


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_number_of_the_settings_has_a_range(config: Any) -> None:
    for item in fields(config):
        value = getattr(config, item.name)
        if isinstance(value, bool) or not isinstance(value, int | float | tuple):
            continue
        for number in NO_USE:
            wrong = (number,) * max(1, len(value)) if isinstance(value, tuple) else number
            with pytest.raises(ConfigError, match=f"{item.name.replace('_', '-')} is") as caught:
                replace(config, **{item.name: wrong})
            assert len(str(caught.value)) < 500


def test_settings_of_earlier_versions_are_read() -> None:
    config = from_dict(DataConfig, {"root": "photos", "colour_jitter": 0.1})
    assert config.color_jitter == 0.1
