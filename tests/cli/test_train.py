from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcnseg.checkpoint import RESUME_STATE, load_resume_state
from dcnseg.config import DataConfig, ModelConfig, TrainConfig
from dcnseg.engine.run_folder import CONFIG, read_metrics, read_run
from dcnseg_cli import reporting
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


def test_a_list_of_pairs_is_found_again_at_resume(
    invoke: Invoke, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [path.stem for path in sorted((scenes / "train" / "images").iterdir())]
    lines = [
        f"train/images/{name}.jpg\ttrain/masks/{name}.png\t{'val' if i < 2 else 'train'}"
        for i, name in enumerate(names[:5])
    ]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    result = invoke("train", scenes, "--out=run", *SMALL, "--epochs=1", "--pairs=pairs.txt")
    assert result.exit_code == 0, result.stderr
    assert len(read_run(Path("run")).split["train"]) == 3
    monkeypatch.chdir("/")
    result = invoke("train", "--resume", tmp_path / "run", "--epochs=2")
    assert result.exit_code == 0, result.stderr
    assert len(read_metrics(tmp_path / "run")) == 2


def test_resume_goes_on(invoke: Invoke, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    invoke("train", scenes, "--out", run, *SMALL, "--epochs=1")
    result = invoke("train", "--resume", run, "--epochs=2")
    assert result.exit_code == 0, result.stderr
    assert [record["epoch"] for record in read_metrics(run)] == [1, 2]


def test_resume_refuses_other_settings(
    invoke: Invoke, scenes: Path, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    result = invoke("train", other, "--resume", run, "--lr=1", "--crop-size=64", f"--out={run}")
    assert result.exit_code == 2
    text = " ".join(result.stderr.replace("│", " ").split())
    assert f"DATA is {other}, the run has {scenes}; --lr is 1.0, the run has 0.02." in text
    assert "crop" not in text


def test_resume_takes_the_same_settings_again(
    invoke: Invoke, scenes: Path, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    options = ("--lr=0.02", "--ema=0.9", "--checkpoint-minutes=3", "--epochs=3")
    result = invoke("train", scenes, "--resume", copy, "--out", copy, *options)
    assert result.exit_code == 0, result.stderr
    assert read_run(copy).config.checkpoint_minutes == 3
    assert len(read_metrics(copy)) == 3


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


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_stopped_run_can_go_on(
    invoke: Invoke, scenes: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The signal goes to all processes, as from a terminal, but for SIGKILL; none stays behind."""
    run = tmp_path / "run"
    program = Path(sys.executable).with_name("dcnseg")
    command = [program, "train", scenes, "--out", run, *SMALL, "--workers=1", "--epochs=500"]
    with subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 2/500" in line:
                (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
                break
        messages = process.stderr.read()
    assert process.returncode == code
    assert "Traceback" not in messages
    if code > 0:
        assert "Stopping after this step" in messages
        assert f"Go on with: dcnseg train --resume {run}" in messages
    deadline = time.monotonic() + 30
    while any_process_of(process.pid):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.05)
    before = load_resume_state(run / RESUME_STATE)["epoch"]
    assert before >= 1
    result = invoke("train", "--resume", run, f"--epochs={before + 1}")
    assert result.exit_code == 0, result.stderr
    assert [record["epoch"] for record in read_metrics(run)] == list(range(1, before + 2))


def any_process_of(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    monkeypatch.setattr(reporting, "_received", received)
    with reporting.postponed_signals():
        reporting._note_and_raise(signal.SIGTERM, None)
        assert reporting.is_signalled()
        with pytest.raises(reporting.TerminatedError):
            reporting._note_and_raise(signal.SIGINT, None)
    received.clear()
    with pytest.raises(KeyboardInterrupt):
        reporting._note_and_raise(signal.SIGINT, None)


def test_the_batch_size_can_be_found(invoke: Invoke, scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = invoke("train", scenes, "--out", run, *SMALL, "--epochs=1", "--batch-size=auto")
    assert result.exit_code == 0, result.stderr
    assert "batches of 8, epochs 1 to 1" in result.stderr  # all the pictures
    record = json.loads((run / CONFIG).read_text())
    assert record["settings"]["batch_size"] == 8
    assert record["sources"]["batch_size"] == "command line, found by trying"
    result = invoke("train", scenes, "--out", run, "--batch-size=many")
    assert result.exit_code == 2
    assert "'many' is not a list of whole numbers" in result.stderr
