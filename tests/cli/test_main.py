from __future__ import annotations

import subprocess
import sys

import pytest

from dcnseg import __version__
from tests.conftest import Invoke

COMMANDS = ("check", "train", "evaluate", "predict", "visualize-offsets", "demo", "info")


def test_help_lists_the_commands(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example(invoke: Invoke, command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"dcnseg {command}" in result.stdout


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"dcnseg {__version__}\n"


def test_wrong_usage_is_2(invoke: Invoke) -> None:
    assert invoke("train", "--no-such-option").exit_code == 2
    assert invoke("no-such-command").exit_code == 2


def test_unexpected_errors_are_one_line_unless_debugging(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcnseg import checkpoint

    def fail(_: object) -> None:
        raise ZeroDivisionError("by zero\nsecond line")

    monkeypatch.setattr(checkpoint, "find_weights", fail)
    result = invoke("info", "run")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: unexpected: ZeroDivisionError: by zero (DCNSEG_DEBUG=1 shows the traceback)\n"
    )
    monkeypatch.setenv("DCNSEG_DEBUG", "1")
    assert isinstance(invoke("info", "run").exception, ZeroDivisionError)


def test_interrupt_is_130(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from dcnseg import checkpoint

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "find_weights", interrupt)
    assert invoke("info", "run").exit_code == 130


def test_a_reader_that_goes_away_is_no_error_to_show() -> None:
    code = "from dcnseg_cli.main import main; main()"
    process = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -c '{code}' info | true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stderr == ""
    assert process.returncode in (0, 1)  # 0 if all was written before the reader went
