from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcnseg.checkpoint import BEST_WEIGHTS, load_segmenter, save_weights
from dcnseg.config import ModelConfig, TrainConfig
from dcnseg.data.class_map import ClassMap
from dcnseg.engine.initial_weights import read_initial_weights
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.run_folder import read_metrics, read_run
from dcnseg.engine.training import resume, train
from dcnseg.errors import CheckpointError, ConfigError
from dcnseg.models.segmenter import build_segmenter
from tests.conftest import small_config
from tests.engine.test_training import StopAfter, StoppedError, without_times

MODEL = ModelConfig(encoder="resnet18", decoder_channels=16)


class Heard(TrainingListener):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def noted(self, text: str) -> None:
        self.notes.append(text)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def report(run: Path, model: ModelConfig, classes: ClassMap, config: TrainConfig) -> Heard:
    heard = Heard()
    initial = read_initial_weights(run, model).for_classes(classes)
    initial.report(build_segmenter(model, classes.num_classes), replace(config, model=model), heard)
    return heard


def test_the_same_network_is_loaded_whole(run: Path, scenes: Path) -> None:
    trained, info = load_segmenter(run / BEST_WEIGHTS)
    model = build_segmenter(MODEL, info.class_map.num_classes)
    initial = read_initial_weights(run / BEST_WEIGHTS, MODEL).for_classes(info.class_map)
    assert initial.load_into(model) == info.preprocessing
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in trained.state_dict().items())
    heard = report(run, MODEL, info.class_map, small_config(scenes))
    encoder = sum(name.startswith("encoder.") for name in own)
    decoder = sum(name.startswith("decoder.") for name in own)
    assert heard.notes == [
        f"Starting from {run / BEST_WEIGHTS}: {encoder} tensors of the encoder and {decoder} of "
        "the decoder are loaded.",
        "Head: loaded, the classes are the same.",
        "Offsets: loaded for 3 deformable layers.",
    ]
    assert heard.warnings == []


def test_classes_are_matched_by_name(run: Path, scenes: Path) -> None:
    trained, info = load_segmenter(run / BEST_WEIGHTS)
    first, second, *rest = info.class_map.names
    names = ("new", second, "newer", first)
    entries = [{"id": 10 * i, "name": name} for i, name in enumerate(names)]
    classes = ClassMap.from_dict({"classes": entries})
    model = build_segmenter(MODEL, 4)
    before = model.segmentation_head[0].weight.detach().clone()  # type: ignore[index]
    read_initial_weights(run, MODEL).for_classes(classes).load_into(model)
    for part in ("weight", "bias"):
        now = getattr(model.segmentation_head[0], part)  # type: ignore[index]
        old = getattr(trained.segmentation_head[0], part)  # type: ignore[index]
        assert torch.equal(now[1], old[1])
        assert torch.equal(now[3], old[0])
    weight = model.segmentation_head[0].weight  # type: ignore[index]
    assert torch.equal(weight[[0, 2]], before[[0, 2]])
    assert report(run, MODEL, classes, small_config(scenes)).notes[1] == (
        f"Head: loaded for the classes of the same name ({second}, {first}); initialized anew for "
        f"2 of 4 classes; not used: {', '.join(rest)}."
    )


def test_no_class_in_common(run: Path, scenes: Path) -> None:
    classes = ClassMap.from_dict({"classes": [{"id": i, "name": f"n{i}"} for i in range(200)]})
    note = report(run, MODEL, classes, small_config(scenes)).notes[1]
    assert note.startswith("Head: initialized anew for 200 of 200 classes; not used: ")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"deform_layers": 0},
            "Offsets: left out where layers are plain now (encoder.layer4.0.conv2, "
            "encoder.layer4.1.conv1, encoder.layer4.1.conv2).",
        ),
        (
            {"deform_layers": 5},
            "Offsets: loaded for 3 deformable layers; zero at first in encoder.layer3.1.conv2, "
            "encoder.layer4.0.conv1.",
        ),
        (
            {"modulated": True, "deform_layers": 2},
            "Offsets: zero at first in encoder.layer4.1.conv1, encoder.layer4.1.conv2; left out "
            "where layers are plain now (encoder.layer4.0.conv2).",
        ),
        ({"offset_groups": 2, "deform_layers": 1}, "zero at first in encoder.layer4.1.conv2; left"),
    ],
)
def test_offsets_are_loaded_where_they_fit(
    run: Path, scenes: Path, changes: dict[str, Any], text: str
) -> None:
    trained, info = load_segmenter(run / BEST_WEIGHTS)
    config = replace(MODEL, **changes)
    model = build_segmenter(config, info.class_map.num_classes)
    initial = read_initial_weights(run, config).for_classes(info.class_map)
    initial.load_into(model)
    assert text in report(run, config, info.class_map, small_config(scenes)).notes[2]
    old = trained.state_dict()
    for name, value in model.state_dict().items():
        if name in old and old[name].shape == value.shape:
            assert torch.equal(value, old[name])
        else:
            assert ".conv_offset." in name
            assert not value.any()


def test_plain_weights_start_plain_offsets(scenes: Path, run: Path, tmp_path: Path) -> None:
    deformable, info = load_segmenter(run / BEST_WEIGHTS)
    model = replace(MODEL, deform_layers=0)
    plain = build_segmenter(model, info.class_map.num_classes).eval()
    plain.load_state_dict(deformable.state_dict(), strict=False)
    save_weights(
        tmp_path / "plain.safetensors",
        plain.state_dict(),
        model=model,
        class_map=info.class_map,
        preprocessing=info.preprocessing,
        scores={},
    )
    started = build_segmenter(MODEL, info.class_map.num_classes).eval()
    initial = read_initial_weights(tmp_path / "plain.safetensors", MODEL)
    initial.for_classes(info.class_map).load_into(started)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(started(x), plain(x), atol=1e-4, rtol=1e-4)
    heard = report(tmp_path / "plain.safetensors", model, info.class_map, small_config(scenes))
    assert heard.notes[2] == "Offsets: none, all layers are plain."


def test_what_changes_the_meaning_of_weights_is_warned_about(run: Path, scenes: Path) -> None:
    config = small_config(scenes)
    config = replace(config, data=replace(config.data, input_scale=0.5))
    model = replace(MODEL, output_stride=8, atrous_rates=(2, 4, 6), late_dilation=4)
    heard = report(run, model, read_run(run).class_map, config)
    assert heard.warnings == [
        "--output-stride 8 differs from that of the weights, 16.",
        "--atrous-rates 2,4,6 differs from that of the weights, 6,12,18.",
        "--late-dilation 4 differs from that of the weights, 0.",
        "--input-scale is 0.5, and the weights were trained with 1: to them everything has another "
        "size now.",
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"encoder": "resnet34"}, "with --encoder resnet18; the settings have --encoder resnet34."),
        ({"architecture": "deeplabv3"}, "Add --architecture deeplabv3plus, or"),
        (
            {"decoder_channels": 256, "encoder": "resnet50"},
            "with --encoder resnet18 --decoder-channels 16; the settings have --encoder resnet50 "
            "--decoder-channels 256.",
        ),
    ],
)
def test_another_network_is_refused_with_the_difference(
    run: Path, scenes: Path, tmp_path: Path, changes: dict[str, object], text: str
) -> None:
    config = small_config(scenes, init=run, model=replace(MODEL, **changes))  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        train(config, tmp_path / "new")
    assert text in str(error.value)
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_there_are_named(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none: no such run folder or weights file"):
        train(small_config(scenes, init=tmp_path / "none"), tmp_path / "new")


def test_a_run_that_starts_from_another_needs_it_no_more(
    run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other classes, relative path, averaged weights; resumed bit for bit without the file."""
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    classes = json.loads((data / "classes.json").read_text())
    last = classes["classes"][-1]["id"]
    classes["classes"][-1] = {"id": last + 1, "name": "another", "color": [1, 2, 3]}
    (data / "classes.json").write_text(json.dumps(classes))
    for mask in data.rglob("masks/*.png"):
        values = np.asarray(Image.open(mask))
        Image.fromarray(np.where(values == last, last + 1, values).astype(np.uint8)).save(mask)
    (tmp_path / "start").mkdir()
    shutil.copy(run / BEST_WEIGHTS, tmp_path / "start" / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    config = small_config(data, epochs=2, ema=0.9, init=Path("start/weights.safetensors"))
    heard = Heard()
    train(config, tmp_path / "straight", listener=heard)
    assert read_metrics(tmp_path / "straight")[0]["loss"] < read_metrics(run)[0]["loss"]
    assert "initialized anew for 1 of 5 classes" in heard.notes[1]
    with pytest.raises(StoppedError):
        train(config, tmp_path / "stopped", listener=StopAfter(1))
    shutil.rmtree(tmp_path / "start")
    monkeypatch.chdir("/")
    resume(tmp_path / "stopped")
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "straight")
    best = [(tmp_path / name / BEST_WEIGHTS).read_bytes() for name in ("stopped", "straight")]
    assert best[0] == best[1]
    recorded = read_run(tmp_path / "stopped").config
    assert recorded.init == tmp_path / "start" / "weights.safetensors"
    assert recorded.encoder_weights == "none"
