from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dcnseg.config import DataConfig, ModelConfig, TrainConfig
from dcnseg.engine.run_folder import CONFIG, read_metrics, read_run
from tests.conftest import Invoke

SMALL = (
    "--encoder=resnet18",
    "--encoder-weights=none",
    "--decoder-channels=16",
    "--crop-size=64",
    "--batch-size=4",
    "--workers=0",
    "--device=cpu",
    "--amp=off",
)


def test_train_writes_a_run_and_says_where_settings_came_from(
    invoke: Invoke, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = invoke("train", scenes, "--out", run, *SMALL, "--epochs=1", "--scale-range=0.5,1.5")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(run)
    assert "epoch 1/1" in result.stderr
    assert "mIoU" in result.stderr
    record = json.loads((run / CONFIG).read_text())
    assert record["settings"]["data"]["scale_range"] == [0.5, 1.5]
    assert record["sources"]["data.scale_range"] == "command line"
    assert record["sources"]["model.encoder"] == "command line"
    assert record["sources"]["weight_decay"] == "default"


def test_every_setting_has_an_option_with_the_default_of_the_config(
    invoke: Invoke, scenes: Path, tmp_path: Path
) -> None:
    invoke("train", scenes, "--out", tmp_path, *SMALL, "--epochs=1")
    config = read_run(tmp_path).config
    given = {
        "model": ModelConfig(encoder="resnet18", decoder_channels=16),
        "data": DataConfig(scenes, crop_size=(64,), workers=0),
    }
    assert config == TrainConfig(
        **given,  # type: ignore[arg-type]
        encoder_weights="none",
        batch_size=4,
        epochs=1,
        device="cpu",
        amp="off",
    )
    sources = json.loads((tmp_path / CONFIG).read_text())["sources"]
    names = {f"data.{name}" for name in DataConfig.__dataclass_fields__}
    names |= {f"model.{name}" for name in ModelConfig.__dataclass_fields__}
    names |= set(TrainConfig.__dataclass_fields__) - {"data", "model"}
    assert set(sources) == names


def test_resume_goes_on(invoke: Invoke, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    invoke("train", scenes, "--out", run, *SMALL, "--epochs=1")
    result = invoke("train", "--resume", run, "--epochs=2")
    assert result.exit_code == 0, result.stderr
    assert [record["epoch"] for record in read_metrics(run)] == [1, 2]


def test_resume_refuses_other_settings(invoke: Invoke, scenes: Path, run: Path) -> None:
    result = invoke("train", scenes, "--resume", run, "--lr=1")
    assert result.exit_code == 2
    assert "DATA, --lr cannot be changed when a run goes on" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "give DATA and --out RUN, or --resume RUN"),
        (["{scenes}"], 2, "give DATA and --out RUN"),
        (["{scenes}", "--out={tmp}/r", "--crop-size=a"], 2, "'a' is not a list of whole numbers"),
        (["{scenes}", "--out={tmp}/r", "--batch-size=1"], 2, "--batch-size is 1; expected at"),
        (["{scenes}", "--out={tmp}/r", "--encoder=x", "--encoder-weights=none"], 2, "is 'x'"),
        (["{tmp}/none", "--out={tmp}/r"], 3, "none"),
        (["--resume={tmp}"], 1, "has no config.json; expected a run folder"),
        (["{scenes}", "--out={scenes}"], 2, "is not empty"),
    ],
)
def test_errors_are_one_line_and_a_code(
    invoke: Invoke, scenes: Path, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    filled = [argument.format(scenes=scenes, tmp=tmp_path) for argument in arguments]
    result = invoke("train", *filled)
    assert result.exit_code == code
    assert text in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_can_go_on(
    invoke: Invoke, scenes: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    program = Path(sys.executable).with_name("dcnseg")
    command = [str(program), "train", str(scenes), "--out", str(run), *SMALL, "--epochs=500"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 2/500" in line:
                process.send_signal(number)
                break
        messages = process.stderr.read()
    assert process.returncode == code
    assert f"Go on with: dcnseg train --resume {run}" in messages
    assert "Traceback" not in messages
    before = len(read_metrics(run))
    result = invoke("train", "--resume", run, f"--epochs={before + 1}")
    assert result.exit_code == 0, result.stderr
    assert len(read_metrics(run)) == before + 1
