"""Trains and applies one encoder of every family, or checks the reason why it is refused.

Takes ten minutes and mostly tests smp and timm, so it runs only on request, after a version change:
DCNSEG_ENCODER_FAMILIES=1 pytest tests/models/test_encoder_families.py
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp

from dcnseg.config import ModelConfig
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.training import train
from dcnseg.errors import ConfigError
from dcnseg.inference.predictor import Predictor
from tests.conftest import small_config

NO_DILATION = "does not support dilation, so its output stride is always 32"
WORKS = ""

# The smallest encoder of each smp family, and some of timm, with the reason why it is refused.
FAMILIES = {
    "resnet18": WORKS,
    "resnext50_32x4d": WORKS,
    "dpn68": WORKS,
    "vgg11": NO_DILATION,
    "se_resnet50": WORKS,
    "densenet121": NO_DILATION,
    "inceptionresnetv2": NO_DILATION,
    "inceptionv4": NO_DILATION,
    "efficientnet-b0": "has 0 plain 3x3 convolutions",
    "mobilenet_v2": WORKS,
    "xception": NO_DILATION,
    "timm-efficientnet-b0": WORKS,
    "timm-tf_efficientnet_lite0": WORKS,
    "timm-skresnet18": WORKS,
    "mit_b0": WORKS,
    "mobileone_s0": "are parallel branches with the same input",
    "mobileone_s1": WORKS,
    "tu-resnet18": WORKS,
    "tu-hrnet_w18": NO_DILATION,
    "tu-mobilenetv3_small_100": WORKS,
    "tu-convnext_tiny": "has 0 plain 3x3 convolutions",
    "tu-swin_tiny_patch4_window7_224": NO_DILATION,
    "tu-regnetx_002": WORKS,
    "tu-resnest14d": WORKS,
    "tu-res2net50_26w_4s": WORKS,
    "tu-repvgg_a0": WORKS,
    "tu-dla34": NO_DILATION,
    "tu-ghostnet_050": NO_DILATION,
    "tu-efficientnetv2_rw_t": WORKS,
    "tu-seresnext26d_32x4d": WORKS,
}

pytestmark = pytest.mark.skipif(
    not os.environ.get("DCNSEG_ENCODER_FAMILIES"), reason="only with DCNSEG_ENCODER_FAMILIES=1"
)


def test_all_smp_families_are_listed() -> None:
    classes = {entry["encoder"] for entry in smp.encoders.encoders.values()}
    assert classes == {
        smp.encoders.encoders[name]["encoder"] for name in FAMILIES if name in smp.encoders.encoders
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_encoder_trains_or_is_refused(name: str, scenes: Path, tmp_path: Path) -> None:
    config = small_config(
        scenes, model=ModelConfig(encoder=name, decoder_channels=16), epochs=6, eval_every=6
    )
    if FAMILIES[name]:
        with pytest.raises(ConfigError, match=FAMILIES[name]):
            train(config, tmp_path / "run")
        return
    train(config, tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert len(records[-1]["offsets"]) == 3
    print(name, records[0]["loss"], records[-1]["loss"], records[-1]["offsets"])
    for statistics in records[-1]["offsets"].values():
        assert math.isfinite(statistics["p95_px"])
    predictor = Predictor.from_checkpoint(tmp_path / "run", device="cpu")
    labels = predictor.predict(np.zeros((50, 70, 3), np.uint8)).labels
    assert labels.shape == (50, 70)
