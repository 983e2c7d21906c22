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
from dcnseg.config import PRESETS, DataConfig, ModelConfig, TrainConfig, flatten_settings, to_dict
from dcnseg.engine import training
from dcnseg.engine.metrics import read_metrics
from dcnseg.engine.run_folder import CONFIG, PREVIEW, read_run
from dcnseg.engine.trainer import TrainResult
from dcnseg_cli import reporting
from dcnseg_cli import train as train_command
from dcnseg_cli.main import app
from tests.conftest import SMALL_TRAINING, Invoke

# What README.md said before there were presets; results/camvid.md was measured with these.
README_SMALL = (
    "--encoder=resnet18 --encoder-weights=none --input-scale=0.5 --crop-size=176,240 "
    "--scale-range=0.75,1.75 --optimizer=adamw --lr=1e-3 --weight-decay=0.01 "
    "--class-weights=sqrt --ema=0.99 --epochs=50 --eval-every=5 --cache --workers=0"
)
Configs = list[tuple[TrainConfig, Mapping[str, str]]]


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> Configs:
    """Settings and sources of the trainings that are asked for; none takes place."""
    seen: Configs = []

    def note(config: TrainConfig, run: Path, **others: Any) -> TrainResult:
        seen.append((config, others["sources"]))
        return TrainResult(run, 1, {"mean_iou": 0.5})

    monkeypatch.setattr(training, "train", note)
    monkeypatch.setattr(train_command, "_report", lambda *_arguments: None)
    return seen


def test_train_writes_a_run_and_says_where_settings_came_from(
    invoke: Invoke, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (*SMALL_TRAINING, "--scale-range=0.5,1.5", "--batch-size=auto")
    result = invoke("train", scenes, "--out", run, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(run)
    paths = f"Preview: {run / PREVIEW}\nWeights: {run / BEST_WEIGHTS}\n"
    score = read_metrics(run)[0]
    for text in (
        "batches of 8, epochs 1 to 1",  # all the images
        "epoch 1/1",
        f"{paths}Next steps:\n",
        f"  dcnseg evaluate {run} {scenes} --split test\n",
        f"  dcnseg predict {run} IMAGES --out predictions\n",
        f"  dcnseg visualize-offsets {run} IMAGES --out offsets\n",
        f"Best: epoch 1 of 1, validation mIoU {score['mean_iou']:.3f}.",
    ):
        assert text in result.stderr
    for name, iou in score["class_iou"].items():
        assert re.search(rf"{name} +│ +{iou:.3f} ", result.stderr)
    record = json.loads((run / CONFIG).read_text())
    assert record["settings"]["data"]["scale_range"] == [0.5, 1.5]
    assert record["settings"]["batch_size"] == 8
    sources = record["sources"]
    assert sources["data.scale_range"] == sources["model.encoder"] == "command line"
    assert sources["batch_size"] == "command line, found by trying"
    assert sources["weight_decay"] == "default"


def test_every_setting_has_an_option_with_the_default_of_the_config(
    invoke: Invoke, configs: Configs
) -> None:
    invoke("train", "photos", "--out=run", *SMALL_TRAINING)
    [(config, sources)] = configs
    model = ModelConfig(encoder="resnet18", decoder_channels=16)
    data = DataConfig(Path("photos"), crop_size=(64,), workers=0)
    given: dict[str, Any] = {"encoder_weights": "none", "device": "cpu", "amp": "off"}
    assert config == TrainConfig(data, model, batch_size=4, epochs=1, **given)
    assert set(sources) == set(flatten_settings(config)) - {"augment"}


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
    result = invoke("train", scenes, "--out=run", *SMALL_TRAINING, "--pairs=pairs.txt")
    assert result.exit_code == 0, result.stderr
    assert len(read_run(Path("run")).split["train"]) == 3
    monkeypatch.chdir("/")
    result = invoke("train", "--resume", tmp_path / "run", "--epochs=2")
    assert result.exit_code == 0, result.stderr
    assert len(read_metrics(tmp_path / "run")) == 2


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


NEW = "{scenes} --out={tmp}/r"
ERRORS = [
    ("", 2, "pass DATA and --out RUN, or --resume RUN"),
    ("{scenes}", 2, "pass DATA and --out RUN"),
    (f"{NEW} --crop-size=a", 2, "'a' is not a list of integers"),
    (f"{NEW} --crop-size=64,", 2, "'64,' is not a list of integers"),
    (f"{NEW} --ignore-index=1,,2", 2, "'1,,2' is not a list of integers"),
    (f"{NEW} --batch-size=many", 2, "'many' is not a list of integers"),
    (f"{NEW} --batch-size=1", 2, "--batch-size is 1; expected at"),
    (f"{NEW} --encoder=x --encoder-weights=none", 2, "is 'x'"),
    ("{tmp}/none --out={tmp}/r", 3, "none"),
    ("{scenes} --out={scenes}", 2, "is the data folder"),
    (f"{NEW} --loss=dise", 2, "--loss is 'dise'; expected one of"),
    (f"{NEW} --encoder=ResNet18", 2, "Did you mean resnet18?"),
    (f"{NEW} --optimizer=Adam", 2, "Did you mean adamw?"),
    (f"{NEW} --preset=smal", 2, "Did you mean small?"),
    (f"{NEW} --device=cud", 2, "Did you mean cuda?"),
    (f"{NEW} --val-fraction=0", 2, "Training needs validation images: pass"),
    (f"{NEW} --encoder-weights={{scenes}}", 2, "use --init {scenes}"),
    (f"{NEW} --encoder-weights=imagnet", 2, "Did you mean imagenet?"),
    (f"{NEW} --init={{tmp}}/none", 1, "none does not exist; expected a run folder"),
    (f"{NEW} --init=x --encoder-weights=none", 2, "omit --encoder"),
    (f"{NEW} --rotate=200", 2, "--rotate is 200.0; expected at"),
    (f"{NEW} --blur=-1", 2, "--blur is -1.0; expected at"),
    (f"{NEW} --blur=1e-300", 2, "--blur is 1e-300; expected 0 (off)"),
    (f"{NEW} --color-jitter=2", 2, "--color-jitter is 2.0; expected"),
    (f"{NEW} --colour-jitter=2", 2, "--color-jitter is 2.0; expected"),
    ("--resume={tmp}", 1, "has no config.json; expected a run folder"),
    ("--resume={run} --preset=small", 2, "--preset small is for a new run. Remove these options"),
    (
        "{tmp} --resume={run} --lr=1 --crop-size=64 --out={run}",
        2,
        "--resume: DATA is {tmp}, the run has {scenes}; --lr is 1.0, the run has 0.02. Remove",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "text"), ERRORS)
def test_errors_are_one_line_and_a_code(
    invoke: Invoke, scenes: Path, run: Path, tmp_path: Path, arguments: str, code: int, text: str
) -> None:
    paths = {"scenes": scenes, "run": run, "tmp": tmp_path}
    result = invoke("train", *arguments.format(**paths).split())
    assert result.exit_code == code
    printed = " ".join(result.stderr.replace("│", " ").split())
    assert text.format(**paths) in printed
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "r").exists()


def long_training(scenes: Path, run: Path) -> list[str]:
    """A command that would train for minutes, with a worker."""
    program = Path(sys.executable).with_name("dcnseg")
    command = (program, "train", scenes, "--out", run, *SMALL_TRAINING, "--workers=1")
    return [*map(str, command), "--epochs=500"]


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
    command = long_training(scenes, run)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
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
    command = long_training(scenes, tmp_path)
    process, terminal = pty.fork()
    if process == 0:
        os.execv(command[0], command)
    seen = ""
    while "epoch 2/500" not in seen:  # a line may arrive in pieces
        seen += os.read(terminal, 1 << 16).decode(errors="replace")
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert load_resume_state(tmp_path / RESUME_STATE)["epoch"] >= 1


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


def test_a_preset_is_the_options_that_it_stands_for(invoke: Invoke, configs: Configs) -> None:
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
    preset: str, invoke: Invoke, configs: Configs
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
            "[ce|ce+dice|focal|lovasz] [small|default|large] [sgd|adamw] "
            "[deeplabv3plus|deeplabv3|plain] [none|balanced|sqrt] [8|16] [auto|off|bf16|fp16] "
            "[auto|cpu|cuda|cuda:N|mps]",
        ),
        ("evaluate", "[train|val|test|all] [auto|off|bf16|fp16]"),
        ("predict", "[auto|cpu|cuda|cuda:N|mps]"),
    ],
)
def test_help_shows_closed_sets(invoke: Invoke, command: str, sets: str) -> None:
    text = invoke(command, "--help").stdout
    assert "colour" not in text  # the former spelling is accepted, but not shown
    for each in sets.split():
        assert each in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --loss ", ["ce", "ce+dice", "focal", "lovasz"]),
        ("train --encoder resnet1", ["resnet18", "resnet101", "resnet152"]),
        ("train --optimizer a", ["adamw"]),
        ("train --preset ", ["small", "default", "large"]),
        ("train --class-weights ", ["none", "balanced", "sqrt"]),
        ("train --architecture ", ["deeplabv3plus", "deeplabv3", "plain"]),
        ("train --amp b", ["bf16"]),
        ("train --device c", ["cpu", "cuda"]),
        ("evaluate --split ", ["train", "val", "test", "all"]),
        ("predict --device m", ["mps"]),
    ],
)
def test_the_shell_completes_values(words: str, expected: list[str]) -> None:
    line = {"COMP_WORDS": f"dcnseg {words}", "COMP_CWORD": str(words.count(" ") + 1)}
    environment = {"_DCNSEG_COMPLETE": "complete_bash", **line}
    result = CliRunner().invoke(app, prog_name="dcnseg", env=environment)
    assert result.stdout.split() == expected


def test_training_can_start_from_a_run(
    invoke: Invoke, scenes: Path, run: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    options = [option for option in SMALL_TRAINING if "weights" not in option]
    result = invoke("train", scenes, "--out", new, *options, "--init", run)
    assert result.exit_code == 0, result.stderr
    assert "Head: loaded; the classes are the same." in result.stderr
    record = json.loads((new / CONFIG).read_text())
    assert record["settings"]["init"] == str(run)
    assert record["settings"]["encoder_weights"] == "none"
    assert record["sources"]["init"] == "command line"
