from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcnseg.checkpoint import RESUME_STATE
from dcnseg.config import DataConfig, TrainConfig
from dcnseg.data.pairing.folders import find_splits
from dcnseg.engine import comparison as comparison_module
from dcnseg.engine.comparison import (
    STATE,
    compare,
    default_variants,
    resume_comparison,
    variant_settings,
)
from dcnseg.engine.listener import TrainingListener
from dcnseg.engine.run_folder import read_run
from dcnseg.errors import CheckpointError, ConfigError, TrainingError
from tests.conftest import small_config
from tests.engine.runs import KillAfter, KilledError, assert_same_run


def test_variants_differ_in_their_late_layers(scenes: Path) -> None:
    config = small_config(scenes)
    assert {name: variant_settings(name, config) for name in default_variants(config)} == {
        "plain": {"model.deform_layers": 0, "model.late_dilation": 0},
        "dilation4": {"model.deform_layers": 0, "model.late_dilation": 4},
        "deformable": {"model.deform_layers": 3, "model.modulated": False},
        "deformable-v2": {"model.deform_layers": 3, "model.modulated": True},
    }
    for name in ("dilation", "deformable-v3", "Plain", ""):
        with pytest.raises(ConfigError, match="expected plain, dilationN"):
            variant_settings(name, config)


def test_an_interrupted_comparison_goes_on(scenes: Path, tmp_path: Path) -> None:
    config = small_config(scenes, epochs=1, seed=5)
    variants = ("plain", "deformable")
    whole = compare(config, tmp_path / "whole", variants=variants, seeds=(5,))
    listeners = iter([TrainingListener(), KillAfter(1, 1)])  # in the second run

    @contextmanager
    def make_listener() -> Iterator[TrainingListener]:
        yield next(listeners)

    out = tmp_path / "interrupted"
    with pytest.raises(KilledError):
        compare(config, out, variants=variants, seeds=(5,), make_listener=make_listener)
    assert json.loads((out / "comparison.json").read_text())["finished"] == ["plain-seed5"]
    lines: list[str] = []
    resumed = resume_comparison(out, on_run=lines.append)
    assert lines[0] == "Run 2 of 2: deformable, seed 5"
    assert [line.split(":")[0] for line in lines[1:3]] == ["Evaluate 1 of 2", "Evaluate 2 of 2"]
    for name in ("plain-seed5", "deformable-seed5"):
        assert_same_run(tmp_path / "whole" / "runs" / name, out / "runs" / name)
    for left, right in zip(whole.variants, resumed.variants, strict=True):
        assert left.mean_ious == right.mean_ious
    assert resumed.split == "test"
    assert resumed.baseline == "plain"
    assert [(d.variant, d.reference) for d in resumed.differences] == [("deformable", "plain")]
    plain, deformable = (variant.runs[0] for variant in resumed.variants)
    assert plain.offsets is None
    assert deformable.offsets is not None
    assert set(deformable.offsets.mean_iou) == {"zeroed", "shuffled"}
    assert set(deformable.offsets.measures.rank_correlation) == {
        f"encoder.layer4.{layer}" for layer in ("0.conv2", "1.conv1", "1.conv2")
    }
    assert deformable.num_parameters > plain.num_parameters


def test_trained_runs_are_compared(run: Path, scenes: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    comparison = compare(
        small_config(scenes),
        tmp_path / "out",
        variants=(),
        trained={"deformable": [run], "again": [copy]},
    )
    assert [variant.name for variant in comparison.variants] == ["deformable", "again"]
    (difference,) = comparison.differences
    assert difference.interval.difference == 0
    assert comparison.has_trained_runs
    config = json.loads((copy / "config.json").read_text())
    config["split"]["test"] = ["other"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has other test images than the other runs"):
        compare(
            small_config(scenes),
            tmp_path / "other",
            trained={"deformable": [run], "again": [copy]},
        )


def test_every_seed_has_the_same_split(scenes: Path, tmp_path: Path) -> None:
    """Where the folder has no val split, it depends on the seed of a run."""
    data = tmp_path / "data"
    for kind in ("images", "masks"):
        shutil.copytree(scenes / "train" / kind, data / kind)
    shutil.copy(scenes / "classes.json", data)
    assert find_splits(data, seed=1).val != find_splits(data, seed=2).val
    config = small_config(scenes, epochs=1, data=DataConfig(data, crop_size=(64, 64), workers=0))
    compare(config, tmp_path / "out", variants=("plain", "dilation2"), seeds=(1, 2))
    runs = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(runs) == 4
    splits = [read_run(run).split for run in runs]
    assert all(split == splits[0] for split in splits)


def test_a_new_comparison_does_not_reuse_old_runs(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not the checkpoints that an earlier comparison left in the folder."""
    trained: list[int] = []

    def note(config: TrainConfig, run: Path, **_: object) -> None:
        assert not (run / RESUME_STATE).exists()
        trained.append(config.seed)
        raise TrainingError(f"{run.name} diverged")

    monkeypatch.setattr(comparison_module, "train", note)
    old = tmp_path / "runs" / "plain-seed3" / RESUME_STATE
    old.parent.mkdir(parents=True)
    old.touch()
    config, variants = small_config(scenes), ("plain", "deformable")
    with pytest.raises(ConfigError, match=r"is not empty. Choose another folder, add --overwrite"):
        compare(config, tmp_path, variants=variants, seeds=(3,))
    lines: list[str] = []
    with pytest.raises(TrainingError, match="fewer than two variants have a run"):
        compare(
            config, tmp_path, variants=variants, seeds=(3,), overwrite=True, on_run=lines.append
        )
    assert trained == [3, 3]
    assert lines[1::2] == ["Error: plain-seed3 diverged", "Error: deformable-seed3 diverged"]
    failed = json.loads((tmp_path / STATE).read_text())["failed"]
    assert failed == {f"{name}-seed3": f"{name}-seed3 diverged" for name in variants}


def test_every_variant_is_checked_before_the_first_run(scenes: Path, tmp_path: Path) -> None:
    config = small_config(scenes)
    for variants, text in (
        (("plain",), "--variants is plain; expected at least two"),
        (("plain", "dilation5000"), "--late-dilation is 5000; expected"),
    ):
        with pytest.raises(ConfigError, match=text):
            compare(config, tmp_path / "out", variants=variants)
    with pytest.raises(ConfigError, match="`seeds` is empty"):
        compare(config, tmp_path / "out", seeds=())
    with pytest.raises(ConfigError, match="contains the data folder"):
        compare(config, scenes.parent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        *("{", "[]", {"seeds": 3}, {"seeds": []}, {"variants": "plain"}, {"trained": []}),
        *({"finished": [1]}, {"failed": {"a": 1}}, {"settings": None}, {"command": None}),
    ],
)
def test_a_damaged_comparison_is_named(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: object
) -> None:
    with pytest.raises(CheckpointError, match=r"has no comparison\.json"):
        resume_comparison(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise TrainingError("diverged")

    monkeypatch.setattr(comparison_module, "train", fail)
    with pytest.raises(TrainingError):
        compare(small_config(scenes), tmp_path / "out")
    path = tmp_path / "out" / STATE
    content = json.loads(path.read_text())
    path.write_text(damage if isinstance(damage, str) else json.dumps(content | dict(damage)))  # type: ignore[call-overload]
    with pytest.raises(CheckpointError, match=r"comparison\.json is damaged: "):
        resume_comparison(tmp_path / "out")
