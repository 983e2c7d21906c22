from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dcnseg.checkpoint import BEST_WEIGHTS, RESUME_STATE, load_resume_state
from dcnseg.config import PRESETS, DataConfig, ModelConfig, TrainConfig, to_dict
from dcnseg.engine import training
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import CONFIG, PREVIEW, read_run
from dcnseg.engine.trainer import TrainResult
from dcnseg_cli import reporting
from dcnseg_cli import train as train_command
from dcnseg_cli.main import app
from tests.conftest import Invoke

# What README.md said before there were presets; results/camvid.md was measured with these.
README_SMALL = (
    "--encoder=resnet18 --encoder-weights=none --input-scale=0.5 --crop-size=176,240 "
    "--scale-range=0.75,1.75 --optimizer=adamw --lr=1e-3 --weight-decay=0.01 "
    "--class-weights=sqrt --ema=0.99 --epochs=50 --eval-every=5 --cache --workers=0"
)
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
    paths = f"Preview: {run / PREVIEW}\nWeights: {run / BEST_WEIGHTS}\n"
    assert f"{paths}Next steps:\n" in result.stderr
    assert f"  dcnseg evaluate {run} {scenes} --split test\n" in result.stderr
    assert f"  dcnseg predict {run} IMAGES --out predictions\n" in result.stderr
    assert f"  dcnseg visualize-offsets {run} IMAGES --out offsets\n" in result.stderr
    score = read_metrics(run)[0]
    assert f"Best: epoch 1 of 1, validation mIoU {score['mean_iou']:.3f}." in result.stderr
    for name, iou in score["class_iou"].items():
        assert re.search(rf"{name} +│ +{iou:.3f} ", result.stderr)
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
    names |= set(TrainConfig.__dataclass_fields__) - {"data", "model", "augment"}
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
        ([], 2, "pass DATA and --out RUN, or --resume RUN"),
        (["{scenes}"], 2, "pass DATA and --out RUN"),
        (["{scenes}", "--out={tmp}/r", "--crop-size=a"], 2, "'a' is not a list of integers"),
        (["{scenes}", "--out={tmp}/r", "--batch-size=1"], 2, "--batch-size is 1; expected at"),
        (["{scenes}", "--out={tmp}/r", "--encoder=x", "--encoder-weights=none"], 2, "is 'x'"),
        (["{tmp}/none", "--out={tmp}/r"], 3, "none"),
        (["--resume={tmp}"], 1, "has no config.json; expected a run folder"),
        (["{scenes}", "--out={scenes}"], 2, "is the data folder"),
        (["{scenes}", "--out={tmp}/r", "--loss=dise"], 2, "--loss is 'dise'; expected one of"),
        (["{scenes}", "--out={tmp}/r", "--encoder=ResNet18"], 2, "Did you mean resnet18?"),
        (["{scenes}", "--out={tmp}/r", "--optimizer=Adam"], 2, "Did you mean adamw?"),
        (["{scenes}", "--out={tmp}/r", "--preset=smal"], 2, "Did you mean small?"),
        (["{scenes}", "--out={tmp}/r", "--device=cud"], 2, "Did you mean cuda?"),
        (
            ["{scenes}", "--out={tmp}/r", "--val-fraction=0"],
            2,
            "Training needs validation images: pass",
        ),
        (["{scenes}", "--out={tmp}/r", "--encoder-weights={scenes}"], 2, "use --init {scenes}"),
        (["{scenes}", "--out={tmp}/r", "--encoder-weights=imagnet"], 2, "Did you mean imagenet?"),
        (
            ["{scenes}", "--out={tmp}/r", "--init={tmp}/none"],
            1,
            "none does not exist; expected a run folder",
        ),
        (["{scenes}", "--out={tmp}/r", "--init=x", "--encoder-weights=none"], 2, "omit --encoder"),
        (["{scenes}", "--out={tmp}/r", "--rotate=200"], 2, "--rotate is 200.0; expected at"),
        (["{scenes}", "--out={tmp}/r", "--blur=-1"], 2, "--blur is -1.0; expected at"),
        (["{scenes}", "--out={tmp}/r", "--blur=1e-300"], 2, "--blur is 1e-300; expected 0 (off)"),
        (
            ["{scenes}", "--out={tmp}/r", "--ignore-index=1,,2"],
            2,
            "'1,,2' is not a list of integers",
        ),
        (["{scenes}", "--out={tmp}/r", "--crop-size=64,"], 2, "'64,' is not a list of integers"),
    ],
)
def test_errors_are_one_line_and_a_code(
    invoke: Invoke, scenes: Path, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    filled = [argument.format(scenes=scenes, tmp=tmp_path) for argument in arguments]
    result = invoke("train", *filled)
    assert result.exit_code == code
    printed = " ".join(result.stderr.replace("│", " ").split())
    assert text.format(scenes=scenes) in printed
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
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
        assert f"Resume with: dcnseg train --resume {run}" in messages
    deadline = time.monotonic() + 30
    while any_process_of(process.pid):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.05)
    before = load_resume_state(run / RESUME_STATE)["epoch"]
    assert before >= 1
    result = invoke("train", "--resume", run, f"--epochs={before + 1}")
    assert result.exit_code == 0, result.stderr
    assert [record["epoch"] for record in read_metrics(run)] == list(range(1, before + 2))


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_its_state(scenes: Path, tmp_path: Path) -> None:
    """The system sends SIGHUP, and refuses what is still written to the terminal."""
    run = tmp_path / "run"
    program = Path(sys.executable).with_name("dcnseg")
    options = ("train", str(scenes), "--out", str(run), *SMALL, "--workers=1", "--epochs=500")
    process, terminal = pty.fork()
    if process == 0:
        os.execv(program, (str(program), *options))
    while "epoch 2/500" not in os.read(terminal, 1 << 16).decode(errors="replace"):
        pass
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert load_resume_state(run / RESUME_STATE)["epoch"] >= 1


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
    assert "batches of 8, epochs 1 to 1" in result.stderr  # all the images
    record = json.loads((run / CONFIG).read_text())
    assert record["settings"]["batch_size"] == 8
    assert record["sources"]["batch_size"] == "command line, found by trying"
    result = invoke("train", scenes, "--out", run, "--batch-size=many")
    assert result.exit_code == 2
    assert "'many' is not a list of integers" in result.stderr


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Mapping[str, str]]]:
    """Settings and sources of the trainings that are asked for; none takes place."""
    seen: list[tuple[TrainConfig, Mapping[str, str]]] = []

    def note(config: TrainConfig, run: Path, **others: Any) -> TrainResult:
        seen.append((config, others["sources"]))
        return TrainResult(run, 1, {"mean_iou": 0.5})

    monkeypatch.setattr(training, "train", note)
    monkeypatch.setattr(train_command, "_report", lambda *_arguments: None)
    return seen


def test_a_preset_is_the_options_that_it_stands_for(
    invoke: Invoke, configs: list[tuple[TrainConfig, Mapping[str, str]]]
) -> None:
    invoke("train", "photos", "--out=run", *README_SMALL.split())
    invoke("train", "photos", "--out=run", "--preset=small", "--encoder-weights=none")
    invoke("train", "photos", "--out=run", "--preset=small", "--lr=0.5", "--no-cache")
    invoke("train", "photos", "--out=run", "--preset=default")
    invoke("train", "photos", "--out=run")
    (listed, _), (small, sources), (changed, changed_sources), (default, _), (plain, _) = configs
    assert small == listed
    assert sources["data.crop_size"] == sources["lr"] == "preset small"
    assert sources["encoder_weights"] == "command line"
    assert sources["seed"] == "default"
    assert (changed.lr, changed.data.cache, changed.ema) == (0.5, False, 0.99)
    assert changed_sources["lr"] == changed_sources["data.cache"] == "command line"
    assert default == plain == TrainConfig(DataConfig(Path("photos")))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_settings_and_are_documented(
    preset: str, invoke: Invoke, configs: list[tuple[TrainConfig, Mapping[str, str]]]
) -> None:
    invoke("train", "photos", "--out=run", f"--preset={preset}")
    settings = to_dict(configs[0][0])
    for name, value in PRESETS[preset].items():
        part, _, field = name.rpartition(".")
        own = (settings[part] if part else settings)[field]
        assert own == (list(value) if isinstance(value, tuple) else value)
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    section = page.partition(f"### `--preset {preset}`")[2].partition("\n#")[0]
    options = dict(re.findall(r"--([a-z-]+)(?: ([^-\s`]\S*))?", section.partition("```")[2]))
    assert {name.rpartition(".")[2].replace("_", "-") for name in PRESETS[preset]} == set(options)
    if options:
        given = [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]
        invoke("train", "photos", "--out=run", *given)
        assert configs[1][0] == configs[0][0]


def test_ignored_values_add_up(
    invoke: Invoke, configs: list[tuple[TrainConfig, Mapping[str, str]]]
) -> None:
    options = ("--ignore-index=8", "--ignore-index", "3,4", "--ignore-index=8,12")
    invoke("train", "photos", "--out=run", *options)
    assert configs[0][0].data.ignore_index == (8, 3, 4, 12)


def test_help_begins_with_ten_options(invoke: Invoke) -> None:
    lines = invoke("train", "--help").stdout.splitlines()
    titles = [index for index, line in enumerate(lines) if "─ " in line]
    first = next(index for index in titles if "─ Options" in lines[index])
    panel = lines[first : next(index for index in titles if index > first)]
    options = re.findall(r"│ (--[a-z-]+)", "\n".join(panel))
    assert options == [
        *("--out", "--preset", "--resume", "--init", "--encoder", "--epochs", "--batch-size"),
        *("--crop-size", "--lr", "--device", "--help"),
    ]


@pytest.mark.parametrize(
    ("command", "sets"),
    [
        (
            "train",
            [
                "[ce|ce+dice|focal|lovasz]",
                "[small|default|large]",
                "[sgd|adamw]",
                "[deeplabv3plus|deeplabv3]",
                "[none|balanced|sqrt]",
                "[8|16]",
                "[auto|off|bf16|fp16]",
                "[auto|cpu|cuda|cuda:N|mps]",
            ],
        ),
        ("evaluate", ["[train|val|test|all]", "[auto|off|bf16|fp16]"]),
        ("predict", ["[auto|cpu|cuda|cuda:N|mps]"]),
    ],
)
def test_help_shows_closed_sets(invoke: Invoke, command: str, sets: list[str]) -> None:
    text = invoke(command, "--help").stdout
    for each in sets:
        assert each in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --loss ", ["ce", "ce+dice", "focal", "lovasz"]),
        ("train --encoder resnet1", ["resnet18", "resnet101", "resnet152"]),
        ("train --optimizer a", ["adamw"]),
        ("train --preset ", ["small", "default", "large"]),
        ("train --class-weights ", ["none", "balanced", "sqrt"]),
        ("train --architecture ", ["deeplabv3plus", "deeplabv3"]),
        ("train --amp b", ["bf16"]),
        ("train --device c", ["cpu", "cuda"]),
        ("evaluate --split ", ["train", "val", "test", "all"]),
        ("predict --device m", ["mps"]),
    ],
)
def test_the_shell_completes_values(words: str, expected: list[str]) -> None:
    count = words.count(" ") + 1
    result = CliRunner().invoke(
        app,
        prog_name="dcnseg",
        env={
            "_DCNSEG_COMPLETE": "complete_bash",
            "COMP_WORDS": f"dcnseg {words}",
            "COMP_CWORD": str(count),
        },
    )
    assert result.stdout.split() == expected


def test_resume_takes_no_preset(invoke: Invoke, run: Path) -> None:
    result = invoke("train", "--resume", run, "--preset=small")
    assert result.exit_code == 2
    text = " ".join(result.stderr.replace("│", " ").split())
    assert "--preset small is for a new run. Remove these options" in text


@pytest.mark.parametrize("option", ["--colour-jitter=2", "--color-jitter=2"])
def test_british_spelling_of_an_option_is_accepted(
    option: str, invoke: Invoke, scenes: Path, tmp_path: Path
) -> None:
    result = invoke("train", scenes, "--out", tmp_path / "run", option)
    assert result.exit_code == 2
    assert "--color-jitter is 2.0; expected" in result.stderr
    assert "colour" not in invoke("train", "--help").stdout


def test_training_can_start_from_a_run(
    invoke: Invoke, scenes: Path, run: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    result = invoke(
        "train", scenes, "--out", new, *SMALL[:1], *SMALL[2:], "--init", run, "--epochs=1"
    )
    assert result.exit_code == 0, result.stderr
    assert "encoder tensors and" in result.stderr
    assert "Head: loaded; the classes are the same." in result.stderr
    assert "Offsets: loaded for 3 deformable layers." in result.stderr
    record = json.loads((new / CONFIG).read_text())
    assert record["settings"]["init"] == str(run)
    assert record["settings"]["encoder_weights"] == "none"
    assert record["sources"]["init"] == "command line"
    result = invoke("train", "--resume", new, "--epochs=2")
    assert result.exit_code == 0, result.stderr
