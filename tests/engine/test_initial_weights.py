from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dcnseg.checkpoint import BEST_WEIGHTS, load_segmenter, save_weights
from dcnseg.config import DataConfig, ModelConfig, Preprocessing, TrainConfig, to_dict
from dcnseg.data.class_map import ClassMap
from dcnseg.engine.initial_weights import read_initial_weights
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import read_run
from dcnseg.engine.training import resume, train
from dcnseg.errors import ConfigError
from dcnseg.models.segmenter import Segmenter, build_segmenter
from tests.conftest import rewrite_weights, small_config
from tests.engine.runs import KillAfter, KilledError, Recorder, assert_same_run

MODEL = ModelConfig(encoder="resnet18", decoder_channels=16)


def load(
    source: Path, config: ModelConfig, classes: ClassMap, input_scale: float = 1.0
) -> tuple[Segmenter, Recorder]:
    """Load initial weights into a new network; returns it, and the reported notes and warnings."""
    model, listener = build_segmenter(config, classes.num_classes), Recorder()
    initial = read_initial_weights(source, config).for_classes(classes)
    data = DataConfig(Path(), input_scale=input_scale)
    initial.report(model, TrainConfig(data, config), listener)
    initial.load_into(model)
    return model, listener


def test_the_same_network_is_loaded_completely(run: Path) -> None:
    trained, info = load_segmenter(run / BEST_WEIGHTS)
    model, listener = load(run / BEST_WEIGHTS, MODEL, info.class_map)
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in trained.state_dict().items())
    encoder = sum(name.startswith("encoder.") for name in own)
    decoder = sum(name.startswith("decoder.") for name in own)
    assert listener.notes == [
        f"Initial weights from {run / BEST_WEIGHTS}: loaded {encoder} encoder tensors and "
        f"{decoder} decoder tensors.",
        "Head: loaded; the classes are the same.",
        "Offsets: loaded for 3 deformable layers.",
    ]
    assert listener.warnings == []


def test_classes_are_matched_by_name(run: Path) -> None:
    trained, info = load_segmenter(run / BEST_WEIGHTS)
    first, second, *rest = info.class_map.names
    names = ("new", second, "newer", first)
    entries = [{"id": 10 * i, "name": name} for i, name in enumerate(names)]
    classes = ClassMap.from_dict({"classes": entries})
    torch.manual_seed(0)
    initial = build_segmenter(MODEL, 4).state_dict()
    torch.manual_seed(0)
    model, listener = load(run, MODEL, classes)
    now, old = model.state_dict(), trained.state_dict()
    for name in ("segmentation_head.0.weight", "segmentation_head.0.bias"):
        assert torch.equal(now[name][[1, 3]], old[name][[1, 0]])
        assert torch.equal(now[name][[0, 2]], initial[name][[0, 2]])
    assert listener.notes[1] == (
        f"Head: loaded for classes with the same name ({second}, {first}); randomly initialized "
        f"for 2 of 4 classes; not used: {', '.join(rest)}."
    )


def test_no_class_in_common(run: Path) -> None:
    classes = ClassMap.from_dict({"classes": [{"id": i, "name": f"n{i}"} for i in range(200)]})
    _, listener = load(run, MODEL, classes)
    text = "Head: randomly initialized for 200 of 200 classes; not used: "
    assert listener.notes[1].startswith(text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"deform_layers": 0},
            "Offsets: not used in layers that are no longer deformable (encoder.layer4.0.conv2, "
            "encoder.layer4.1.conv1, encoder.layer4.1.conv2).",
        ),
        (
            {"deform_layers": 5},
            "Offsets: loaded for 3 deformable layers; initialized to zero in "
            "encoder.layer3.1.conv2, encoder.layer4.0.conv1.",
        ),
        (
            {"modulated": True, "deform_layers": 2},
            "Offsets: initialized to zero in encoder.layer4.1.conv1, encoder.layer4.1.conv2; not "
            "used in layers that are no longer deformable (encoder.layer4.0.conv2).",
        ),
        (
            {"offset_groups": 2, "deform_layers": 1},
            "initialized to zero in encoder.layer4.1.conv2; not used",
        ),
    ],
)
def test_offsets_are_loaded_where_they_fit(run: Path, changes: dict[str, Any], text: str) -> None:
    trained, info = load_segmenter(run / BEST_WEIGHTS)
    model, listener = load(run, replace(MODEL, **changes), info.class_map)
    assert text in listener.notes[2]
    old = trained.state_dict()
    for name, value in model.state_dict().items():
        if name in old and old[name].shape == value.shape:
            assert torch.equal(value, old[name])
        else:
            assert ".conv_offset." in name
            assert not value.any()


def test_weights_without_offsets_compute_the_same_at_first(run: Path, tmp_path: Path) -> None:
    config = replace(MODEL, deform_layers=0)
    path, header = tmp_path / "plain.safetensors", {"model": to_dict(config)}
    plain, info = load_segmenter(rewrite_weights(run, path, header, without="conv_offset"))
    model, _ = load(path, MODEL, info.class_map)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain(x), atol=1e-4, rtol=1e-4)
    _, listener = load(path, config, info.class_map)
    assert listener.notes[2] == "Offsets: none; the model has no deformable layers."


REGIONS = ModelConfig(
    encoder="resnet18", encoder_depth=3, architecture="plain", region_head="deformable-rfcn"
)


def class_map(*names: str) -> ClassMap:
    return ClassMap.from_dict({"classes": [{"id": i, "name": n} for i, n in enumerate(names)]})


def load_region_head(
    tmp_path: Path,
    *,
    names: tuple[str, ...] = ("a", "b", "c"),
    before: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[dict[str, bool], list[str], dict[str, Any]]:
    """Load a trained network with a region head and the classes a, b, c into another network.

    `before` are changes of the settings of the trained network, `changes` of those of the other.

    Returns:
        Whether each layer of the new region head has the trained weights, the notes after those of
        the offsets, and the new tensors.
    """
    config, trained_config = replace(REGIONS, **changes), replace(REGIONS, **(before or {}))
    trained = build_segmenter(trained_config, 3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    path = tmp_path / "trained.safetensors"
    save_weights(
        path,
        trained.state_dict(),
        model=trained_config,
        class_map=class_map("a", "b", "c"),
        preprocessing=Preprocessing(),
        scores={},
    )
    model, listener = load(path, config, class_map(*names))
    assert listener.notes[0].endswith(" encoder tensors and 0 decoder tensors.")
    old, new = trained.state_dict(), model.state_dict()
    loaded: dict[str, bool] = {}
    for name in new:
        if name.startswith("region_head."):
            is_same = name in old and torch.equal(old[name], new[name])
            layer = name.removeprefix("region_head.").rpartition(".")[0]
            assert loaded.setdefault(layer, is_same) is is_same
    return loaded, listener.notes[3:], new


CLASS_INDEPENDENT = {"reduce", "votes.box_maps"}
NEW_CLASS_LAYERS = "newly initialized in votes.score_maps, votes.pool.offset_branch"


def test_the_same_region_head_is_loaded(tmp_path: Path) -> None:
    loaded, notes, _ = load_region_head(tmp_path)
    assert all(loaded.values())
    assert loaded.keys() > CLASS_INDEPENDENT
    assert notes == ["Region head: loaded."]


def test_a_new_region_head_is_initialized(tmp_path: Path) -> None:
    loaded, notes, new = load_region_head(tmp_path, before={"region_head": "none"})
    assert not any(loaded.values())
    assert notes == ["Region head: randomly initialized."]
    assert new["region_head.reduce.weight"].all()


def test_a_region_head_that_is_not_needed_is_ignored(tmp_path: Path) -> None:
    loaded, notes, _ = load_region_head(tmp_path, region_head="none")
    assert loaded == {}
    assert notes == ["Region head: not used; the model has none."]


def test_networks_without_region_heads_have_no_note(tmp_path: Path) -> None:
    without = {"region_head": "none"}
    _, notes, _ = load_region_head(tmp_path, before=without, region_head="none")
    assert notes == []


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "d"), ("b", "a", "c")])
def test_a_region_head_for_other_classes_is_loaded_in_part(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    loaded, notes, _ = load_region_head(tmp_path, names=names)
    assert {layer for layer, is_loaded in loaded.items() if is_loaded} == CLASS_INDEPENDENT
    assert notes == [f"Region head: loaded in reduce, votes.box_maps; {NEW_CLASS_LAYERS}."]


def test_a_region_head_that_fits_by_chance_is_not_loaded(tmp_path: Path) -> None:
    """3 + 1 outputs with 3x3 bins have as many maps as 8 + 1 outputs with 2x2 bins."""
    loaded, notes, new = load_region_head(tmp_path, names=tuple("abcdefgh"), region_bins=2)
    assert new["region_head.votes.score_maps.bias"].shape == (36,)
    assert {layer for layer, is_loaded in loaded.items() if is_loaded} == {"reduce"}
    assert "loaded in reduce; newly initialized in votes.score_maps, votes.box_maps" in notes[0]


def test_other_kinds_of_region_heads_are_loaded_where_they_fit(tmp_path: Path) -> None:
    plain = {"region_head": "rfcn"}
    loaded, notes, new = load_region_head(tmp_path, before=plain)
    new_layers = [layer for layer, is_loaded in loaded.items() if not is_loaded]
    assert new_layers == ["votes.pool.offset_branch"]
    assert notes == [
        "Region head: loaded in reduce, votes.score_maps, votes.box_maps; newly initialized in "
        "votes.pool.offset_branch."
    ]
    assert not new["region_head.votes.pool.offset_branch.weight"].any()
    loaded, notes, _ = load_region_head(tmp_path, region_head="rfcn")
    assert all(loaded.values())
    assert "; not used: votes.pool.offset_branch" in notes[0]
    loaded, notes, _ = load_region_head(tmp_path, region_head="deformable-fc")
    assert {layer for layer, is_loaded in loaded.items() if is_loaded} == {"reduce"}
    assert notes[0].startswith("Region head: loaded in reduce; newly initialized in votes.pool.")


def test_fully_connected_layers_are_loaded_as_a_whole(tmp_path: Path) -> None:
    """Other bins and classes change the weights of a layer, but maybe not its bias."""
    fc: dict[str, Any] = {"region_head": "deformable-fc"}
    loaded, _, _ = load_region_head(tmp_path, before=fc, **fc)
    assert all(loaded.values())
    loaded, _, _ = load_region_head(tmp_path, names=("a", "b", "x"), before=fc, **fc)
    assert [layer for layer, is_loaded in loaded.items() if not is_loaded] == ["votes.layers.4"]
    loaded, notes, _ = load_region_head(tmp_path, before=fc, **fc, region_bins=2)
    new = ("votes.pool.offset_branch.0", "votes.pool.offset_branch.4", "votes.layers.0")
    assert tuple(layer for layer, is_loaded in loaded.items() if not is_loaded) == new
    assert notes[0].endswith(f"; newly initialized in {', '.join(new)}.")


def test_settings_that_differ_give_warnings(run: Path) -> None:
    config = replace(MODEL, output_stride=8, atrous_rates=(2, 4, 6), late_dilation=4)
    _, listener = load(run, config, read_run(run).class_map, input_scale=0.5)
    assert listener.warnings == [
        "--output-stride 8 differs from the 16 of the initial weights.",
        "--atrous-rates 2,4,6 differs from the 6,12,18 of the initial weights.",
        "--late-dilation 4 differs from the 0 of the initial weights.",
        "--input-scale is 0.5, but the initial weights were trained with 1: objects have a "
        "different size in the network's input.",
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architecture": "deeplabv3"}, "Add --architecture deeplabv3plus, or"),
        (
            {"decoder_channels": 256, "encoder": "resnet50"},
            "needs --encoder resnet18 --decoder-channels 16, but the settings are --encoder "
            "resnet50 --decoder-channels 256.",
        ),
    ],
)
def test_another_network_is_refused(
    run: Path, scenes: Path, tmp_path: Path, changes: dict[str, object], text: str
) -> None:
    config = small_config(scenes, init=run, model=replace(MODEL, **changes))  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        train(config, tmp_path / "new")
    assert text in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_resume_does_not_need_the_initial_weights(
    run: Path, data_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other classes, a relative path and averaged weights; resumed without the initial weights."""
    classes = json.loads((data_copy / "classes.json").read_text())
    classes["classes"][-1]["name"] = "another"
    (data_copy / "classes.json").write_text(json.dumps(classes))
    (tmp_path / "start").mkdir()
    shutil.copy(run / BEST_WEIGHTS, tmp_path / "start" / "weights.safetensors")
    monkeypatch.chdir(tmp_path)
    config = small_config(data_copy, epochs=2, ema=0.9, init=Path("start/weights.safetensors"))
    listener = Recorder()
    train(config, tmp_path / "straight", listener=listener)
    assert read_metrics(tmp_path / "straight")[0]["loss"] < read_metrics(run)[0]["loss"]
    assert any("randomly initialized for 1 of 4 classes" in note for note in listener.notes)
    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", listener=KillAfter(1))
    shutil.rmtree(tmp_path / "start")
    monkeypatch.chdir("/")
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
    recorded = read_run(tmp_path / "killed").config
    assert recorded.init == tmp_path / "start" / "weights.safetensors"
    assert recorded.encoder_weights == "none"
