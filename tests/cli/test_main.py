from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer

from dcnseg import __version__
from dcnseg.errors import ConfigError, DataError, OtherProcessError, TrainingStoppedError
from dcnseg_cli import main
from dcnseg_cli.reporting import (
    USAGE,
    HungUpError,
    TerminatedError,
    fail,
    show_warnings_as_messages,
)
from tests.conftest import Invoke

COMMANDS = ("check", "train", "evaluate", "export", "predict", "visualize-offsets", "demo", "info")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_listed_and_its_help_has_an_example(invoke: Invoke, command: str) -> None:
    assert command in invoke("--help").stdout
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"dcnseg {command}" in result.stdout


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"dcnseg {__version__}\n"


def test_unexpected_errors_are_one_line_unless_debugging(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(ZeroDivisionError("by zero\nsecond line"), monkeypatch)
    result = invoke("info", "run")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: unexpected error: ZeroDivisionError: by zero "
        "(set DCNSEG_DEBUG=1 for the traceback)\n"
    )
    monkeypatch.setenv("DCNSEG_DEBUG", "1")
    assert isinstance(invoke("info", "run").exception, ZeroDivisionError)


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `dcnseg info RUN` raise an error."""
    from dcnseg import checkpoint

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "find_weights", fail)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (HungUpError(), 129, "hung up"),
        (TerminatedError(), 143, "terminated"),
    ],
)
def test_signals_have_their_own_codes(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    fail_with(error, monkeypatch)
    result = invoke("info", "run")
    assert (result.exit_code, result.stderr) == (code, f"Error: {text}\n")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `dcnseg` is the program."""
    program = Path(sys.executable).with_name("dcnseg")
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; dcnseg() {{ {program} "$@"; }}; {line}'],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("line", ["dcnseg info", "dcnseg --help"])
def test_a_reader_that_goes_away_is_no_error_to_show(line: str) -> None:
    result = shell(f"{line} | true")
    assert result.stderr == ""
    assert result.returncode in (0, 1)  # 0 if all was written before the reader went


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("line", ["--version", "--help", "check {scenes}"])
def test_a_stdout_that_is_full_is_named(scenes: Path, line: str, unbuffered: str) -> None:
    command = f"dcnseg {line.format(scenes=scenes)}"
    result = shell(f"{command} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert result.stderr == "Error: cannot write to stdout: No space left on device\n"
    assert result.returncode == 1


def test_wrong_usage_is_told_by_the_program_without_control_characters() -> None:
    result = shell("dcnseg check $'--\\x1b[2J'")
    assert result.returncode == 2
    assert r"No such option: --\x1b[2J" in result.stderr
    assert "Traceback" not in result.stderr
    assert "\x1b" not in result.stderr


def test_nohup_keeps_sighup_ignored_and_other_programs_do_not() -> None:
    for before, is_ignored in (("SIG_DFL", "False"), ("SIG_IGN", "True")):
        code = (
            f"import signal; signal.signal(signal.SIGHUP, signal.{before}); "
            "from dcnseg_cli.reporting import raise_on_signals; raise_on_signals(); "
            "print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
        )
        assert shell(f"{sys.executable} -c '{code}'").stdout == f"{is_ignored}\n"


def test_warnings_of_libraries_are_escaped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show_warnings_as_messages()
        warnings.warn("a\x1b[2Jb", stacklevel=1)
    assert "UserWarning: a\\x1b[2Jb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("exception", "code"),
    [("KeyboardInterrupt", 130), ("TerminatedError", 143), ("HungUpError", 129)],
)
def test_signals_before_a_command_runs_leave_no_traceback(exception: str, code: int) -> None:
    program = (
        "from dcnseg_cli import main\n"
        "from dcnseg_cli.reporting import HungUpError, TerminatedError\n"
        f"def stop(**_): raise {exception}\n"
        "main.app = stop\n"
        "main.main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, "Error: interrupted\n")


@pytest.fixture
def second_process(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables that torchrun sets in the second of two processes."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (variables | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_commands_that_several_processes_cannot_share(
    invoke: Invoke, second_process: pytest.MonkeyPatch
) -> None:
    result = invoke("info")
    assert result.exit_code == USAGE
    text = "info cannot be shared by the 2 processes that torchrun has started; only train and"
    assert text in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    second_process.setattr(sys, "argv", ["dcnseg", "info"])
    assert main._run() == USAGE
    assert invoke("train", "--help").exit_code == 0


@pytest.mark.parametrize(
    ("error", "is_shown"),
    [
        (DataError("a.png: is broken."), True),
        (ConfigError("--lr is -1."), False),  # the first process of the machine reports it
        (OtherProcessError("why"), False),
        (TrainingStoppedError("stopped"), False),
        (TerminatedError(), False),
    ],
)
def test_errors_of_other_processes_are_reported_once(
    second_process: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    is_shown: bool,
) -> None:
    second_process.delenv("DCNSEG_DEBUG", raising=False)
    with pytest.raises(typer.Exit):
        fail("reason", 1, error)
    shown = capsys.readouterr().err
    assert bool(shown) == is_shown
    if is_shown:
        assert shown.startswith(f"[rank 1, process {os.getpid()} on ")
        assert shown.endswith("] Error: reason\n")


def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "dcnseg_cli", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"dcnseg {__version__}\n"
