from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from dcnseg import checkpoint
from dcnseg.checkpoint import (
    BEST_WEIGHTS,
    METADATA_KEY,
    RESUME_STATE,
    TrainingDataStats,
    find_weights,
    load_resume_state,
    load_segmenter,
    read_weights_info,
    save_resume_state,
    save_weights,
)
from dcnseg.config import ModelConfig, Preprocessing, to_dict
from dcnseg.data.class_map import ClassInfo, ClassMap
from dcnseg.errors import CheckpointError
from dcnseg.models.segmenter import build_segmenter
from tests.conftest import rewrite_weights
from tests.garbage import JSON_GARBAGE, garbled, refusal
from tests.models.test_encoder import HOSTILE_NAMES, no_sockets  # noqa: F401

MODEL = ModelConfig(encoder="resnet18", decoder_channels=16, deform_layers=1)


def model_with(**changes: Any) -> dict[str, Any]:
    return {"model": to_dict(MODEL) | changes}


CLASSES = ClassMap(
    (ClassInfo(3, "road", (128, 64, 128)), ClassInfo(7, "tree", (0, 200, 0))),
    (ClassInfo(0, "void", (0, 0, 0)),),
)
PREPROCESSING = Preprocessing(mean=(0.1, 0.2, 0.3), input_scale=0.5)
STATS = TrainingDataStats(9, (10, 20), (30, 40), 0.25)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / BEST_WEIGHTS
    torch.manual_seed(0)
    save_weights(
        path,
        build_segmenter(MODEL, 2).state_dict(),
        model=MODEL,
        class_map=CLASSES,
        preprocessing=PREPROCESSING,
        scores={"mean_iou": 0.5},
        training_data=STATS,
    )
    return path


def test_load_segmenter_restores_the_network_and_its_metadata(weights: Path) -> None:
    model, info = load_segmenter(weights)
    assert info.path == weights
    assert (info.model, info.class_map, info.preprocessing) == (MODEL, CLASSES, PREPROCESSING)
    assert (info.scores, info.training_data) == ({"mean_iou": 0.5}, STATS)
    torch.manual_seed(0)
    expected = build_segmenter(MODEL, 2).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()[METADATA_KEY])
    return header


def save_with(path: Path, model: ModelConfig) -> None:
    save_weights(
        path,
        build_segmenter(model, 2).state_dict(),
        model=model,
        class_map=CLASSES,
        preprocessing=PREPROCESSING,
        scores={},
    )


def test_a_file_without_a_region_head_does_not_mention_one(tmp_path: Path) -> None:
    """So that earlier versions, which know no region heads, read it."""
    path = tmp_path / BEST_WEIGHTS
    save_with(path, MODEL)
    assert list(header_of(path)["model"]) == [
        *("architecture", "encoder", "encoder_depth", "output_stride", "deform_layers"),
        *("late_dilation", "modulated", "offset_groups", "decoder_channels", "atrous_rates"),
    ]
    model, info = load_segmenter(path)
    assert info.model == MODEL
    assert not [name for name in model.state_dict() if "region" in name]


@pytest.mark.parametrize("region_head", ["rfcn", "deformable-rfcn", "deformable-fc"])
def test_a_region_head_is_saved_and_loaded(tmp_path: Path, region_head: str) -> None:
    path = tmp_path / BEST_WEIGHTS
    config = replace(MODEL, region_head=region_head, region_bins=2, region_min_area=9)
    torch.manual_seed(0)
    save_with(path, config)
    torch.manual_seed(0)
    expected = build_segmenter(config, 2).eval()
    model, info = load_segmenter(path)
    assert info.model == config
    settings = header_of(path)["model"]
    assert [settings[f"region_{name}"] for name in ("head", "bins", "min_area")] == [
        region_head,
        2,
        9,
    ]
    assert model.require_region_head().min_area == 9
    boxes = [torch.tensor([[3.0, 2, 30, 28]])]
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        outputs = [net(x, lambda _logits: boxes)[1] for net in (model, expected)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].deltas, outputs[1].deltas)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"region_head": "rfcn"}, r"2 unexpected \(region_head\.votes\.pool\.offset_branch"),
        ({"region_head": "none"}, r"10 unexpected \(region_head\."),
        (
            {"region_bins": 3},
            r"with a wrong shape \(region_head\.votes\.score_maps\.weight is \[12,",
        ),
        ({"region_head": "fc"}, r"its metadata is damaged: --region-head is 'fc'; expected one of"),
    ],
)
def test_a_region_head_that_differs_from_the_metadata(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    path, config = tmp_path / "a", replace(MODEL, region_head="deformable-rfcn", region_bins=2)
    save_with(path, config)
    wrong = rewrite_weights(path, tmp_path / "b", {"model": to_dict(config) | changes})
    with pytest.raises(CheckpointError, match=text):
        load_segmenter(wrong)


def test_weights_file_has_the_default_permissions(weights: Path) -> None:
    ordinary = weights.with_name("ordinary")
    ordinary.touch()
    assert weights.stat().st_mode == ordinary.stat().st_mode


def test_find_weights(weights: Path, tmp_path: Path) -> None:
    assert find_weights(weights) == find_weights(weights.parent) == weights
    with pytest.raises(CheckpointError, match="nothing does not exist; expected a run folder"):
        find_weights(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no best\.safetensors"):
        find_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is not a regular file; expected a run folder"):
        find_weights(tmp_path / "pipe")


def test_other_files_are_no_weights_files(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"other\.safetensors was not written by dcnseg"):
        load_segmenter(path)
    save_resume_state(tmp_path / RESUME_STATE, {"epoch": 1})
    text = r"last\.ckpt is a torch\.save file.*expected a weights"
    with pytest.raises(CheckpointError, match=text):
        load_segmenter(tmp_path / RESUME_STATE)


BIAS = "segmentation_head.0.bias"


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        (BIAS, torch.tensor([1.0, float("nan")]), f"1 of the 2 values of {BIAS} are not finite"),
        # Overflows in float32.
        (BIAS, torch.tensor([1.0, 1e300]).double(), f"1 of the 2 values of {BIAS} are not finite"),
        (
            "encoder.conv1.weight",
            torch.ones(64, 3, 7, 7).int(),
            r"1 of \d+ with a wrong dtype \(encoder\.conv1\.weight is torch.int32 instead",
        ),
        ("a\n\x1b[2J", torch.ones(1), r"1 unexpected \(a\?\?\[2J\)\.$"),
    ],
)
def test_invalid_tensor_is_an_error(
    weights: Path, tmp_path: Path, name: str, values: torch.Tensor, text: str
) -> None:
    path = rewrite_weights(weights, tmp_path / "x.safetensors", {}, {name: values})
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{text}"):
        load_segmenter(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 99, "dcnseg": "9.9"}, "has format 99, written by dcnseg 9.9"),
        (
            {"model": {"encoder": "resnet34", "decoder_channels": 16}},
            r"do not fit the deeplabv3plus with encoder resnet34 in its metadata: \d+ of \d+ "
            r"missing \(encoder\.layer1\.2\.conv1\.weight, ",
        ),
        (model_with(deform_layers=0), r"\d unexpected \(.*offset"),
        (model_with(offset_groups=2), r"a wrong shape \(.* is \[18, "),
        (model_with(encoder="resnet"), "cannot be built: --encoder is 'resn"),
        (
            model_with(decoder_channels=10**9),
            "--decoder-channels is 1000000000; expected at least 1 and at most 4096",
        ),
        (
            model_with(decoder_channels=4000),
            "metadata has 2 classes and 4000 decoder channels, but .* has 2 and 16",
        ),
        (model_with(decoder_channels="16"), "its metadata is damaged"),
        (model_with(deform_layers=1.5), "is 1.5; expected an integer"),
        (
            model_with(deform_layers=99),
            "cannot be built: --deform-layers is 99",
        ),
        (
            {"classes": {"classes": [{"id": id_, "name": str(id_)} for id_ in range(3)]}},
            "metadata has 3 classes and 16 decoder channels, but its .* has 2 and 16",
        ),
        ({"training_data": {"num_images": 1}}, "its metadata is damaged"),
        ({"format": "new"}, "its metadata is damaged"),
        ({"model": {"color": "red"}}, "unknown field 'color' in the model settings; was the file"),
        ({"classes": {"classes": []}}, "its metadata is damaged"),
        ({"preprocessing": {"std": [0, 1, 1]}}, "its metadata is damaged"),
    ],
)
def test_invalid_metadata_is_an_error(
    weights: Path, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_segmenter(rewrite_weights(weights, tmp_path / "changed.safetensors", change))


def write_metadata(path: Path, header: str) -> Path:
    path.write_bytes(save({}, metadata={METADATA_KEY: header}))
    return path


def test_any_invalid_value_in_the_metadata_is_one_error(weights: Path, tmp_path: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    header["scores"] = {"mean_iou": 0.5, "class_iou": {"road": 0.5, "tree": None}}
    path = tmp_path / "x.safetensors"
    assert read_weights_info(write_metadata(path, json.dumps(header))).training_data == STATS
    num_refused = 0
    for _, content in garbled(header, JSON_GARBAGE):
        write_metadata(path, json.dumps(content))
        message = refusal(lambda: json.dumps(read_weights_info(path).scores, allow_nan=False))
        if message:
            assert message.startswith(str(path))
            assert len(message) < 600
            assert message.isprintable()
            num_refused += 1
    assert num_refused > 500


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 10**5, "1" * 5000, '"\\ud800"'])
def test_metadata_that_is_no_json_object_is_an_error(tmp_path: Path, text: str) -> None:
    path = write_metadata(tmp_path / "x.safetensors", text)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its metadata is damaged: "):
        read_weights_info(path)


@pytest.mark.usefixtures("no_sockets")
def test_metadata_never_opens_a_socket(weights: Path, tmp_path: Path) -> None:
    for encoder in HOSTILE_NAMES:
        model = model_with(encoder=encoder)
        path = rewrite_weights(weights, tmp_path / "x.safetensors", model)
        with pytest.raises(CheckpointError, match=r"cannot be built: --encoder is "):
            load_segmenter(path)
    load_segmenter(weights)


def test_invalid_encoder_allocates_no_memory(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def build(*_args: object) -> None:
        devices.append(str(torch.empty(0).device))
        raise RuntimeError("no stages")

    monkeypatch.setattr(checkpoint, "build_segmenter", build)
    with pytest.raises(CheckpointError, match="cannot be built: no stages"):
        load_segmenter(weights)
    assert devices == ["meta"]


INVALID_IN_STATE: dict[str, tuple[Any, ...]] = {
    "epoch": (None, "3", -1, 1.5, True, 10**30),
    "best_epoch": (None, "3", []),
    "skipped_in_a_row": ("x", -1),
    "best_scores": ([], 3, {"mean_iou": "x"}, {"mean_iou": 7}),
    "settings": (3, [1], {"lr": 1}, {"data": {"root": 3}}),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in INVALID_IN_STATE.items() for value in values],
)
def test_invalid_value_in_a_resume_state_is_an_error(
    tmp_path: Path, field: str, value: Any
) -> None:
    path = tmp_path / RESUME_STATE
    save_resume_state(path, {"epoch": 3} | {field: value})
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged: .*[a-z]"):
        load_resume_state(path)


def test_missing_or_other_resume_state_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no last\.ckpt, so the run cannot be resumed"):
        load_resume_state(tmp_path / RESUME_STATE)
    for other in ([1, 2], {"epoch": 1}, {"format": "1"}, {"format": 99}):
        torch.save(other, tmp_path / RESUME_STATE)
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            load_resume_state(tmp_path / RESUME_STATE)
